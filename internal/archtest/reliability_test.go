package archtest

import "maps"

// The rows of the reliability suite: tools that tests are made with, and
// tests. Nothing that users run imports them.
func init() {
	maps.Copy(arrows, map[string][]string{
		"internal/reliability/check":   {},
		"internal/reliability/sim":     {"internal/reliability/check", "lease", "lease/machine", "fence"},
		"internal/reliability/mutants": {},
	})
	maps.Copy(inTests, map[string][]string{
		"internal/reliability/sim": {"client", "internal/server"},
	})
}
