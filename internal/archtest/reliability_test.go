package archtest

import "maps"

// The rows of the reliability suite: tools that tests are made with, and
// tests. Nothing that users run imports them.
func init() {
	maps.Copy(arrows, map[string][]string{
		"internal/reliability/check":   {},
		"internal/reliability/believe": {"client"},
		"internal/reliability/sim":     {"internal/reliability/believe", "internal/reliability/check", "client", "transport", "lease", "lease/machine", "fence"},
		"internal/reliability/mutants": {},
	})
	inTests["internal/e2e"] = append(inTests["internal/e2e"], "internal/reliability/check", "internal/reliability/believe")
	maps.Copy(inTests, map[string][]string{
		"internal/reliability/sim":     {"internal/server"},
		"internal/reliability/believe": {"internal/server"},
	})
}
