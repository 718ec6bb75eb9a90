//go:build linux

package e2e

import (
	"net"
	"os"
	"os/exec"
	"testing"
)

// TestNoProxyOfTheWeb: HTTPS_PROXY is for the web. What is said to a lock service is
// plaintext, and goes there or nowhere.
func TestNoProxyOfTheWeb(t *testing.T) {
	proxy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		if conn, err := proxy.Accept(); err == nil {
			t.Error("the proxy was asked")
			conn.Close()
		}
	}()
	// An address that documents use: nobody is there.
	cmd := exec.Command(binary, "lock", "ls", "--endpoints", "192.0.2.1:50051", "--timeout", "500ms")
	url := "http://" + proxy.Addr().String()
	cmd.Env = append(os.Environ(), "HTTPS_PROXY="+url, "https_proxy="+url, "HTTP_PROXY="+url, "NO_PROXY=", "no_proxy=")
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Errorf("somebody answered: %s", out)
	}
	proxy.Close()
	<-asked
}
