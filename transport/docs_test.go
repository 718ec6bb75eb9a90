package transport

import (
	"os"
	"regexp"
	"strings"
	"testing"
	"unicode"

	"google.golang.org/grpc/codes"
)

// TestReasonsAreDocumented: the table in docs/api.md is the table of reasons.
func TestReasonsAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	said := make(map[string]string)
	for _, row := range regexp.MustCompile("(?m)^\\| (`[A-Z_`, ]+`) \\| ([A-Za-z_ ]+) \\|").FindAllStringSubmatch(string(text), -1) {
		for reason := range strings.SplitSeq(row[1], ", ") {
			reason = strings.Trim(reason, "`")
			said[reason] = row[2]
			if row[2] == "the same" {
				said[reason] = reason
			}
		}
	}
	for reason, code := range codeOf {
		if said[reason] != wireName(code) {
			t.Errorf("docs/api.md says %q of %s, which is %s", said[reason], reason, wireName(code))
		}
		delete(said, reason)
	}
	for reason := range said {
		t.Errorf("docs/api.md knows the reason %s, the server does not", reason)
	}
}

// wireName is a code as gRPC's specification writes it.
func wireName(code codes.Code) string {
	if code == codes.Canceled {
		return "CANCELED" // gRPC's own two spellings
	}
	var b strings.Builder
	for i, r := range code.String() {
		if unicode.IsUpper(r) && i > 0 {
			b.WriteByte('_')
		}
		b.WriteRune(unicode.ToUpper(r))
	}
	return b.String()
}
