//go:build linux

package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// certificates writes an authority and a certificate for 127.0.0.1, and
// returns the flags that name them.
func certificates(t *testing.T, dir string) []string {
	t.Helper()
	write := func(name, kind string, der []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	caFile := write("ca.pem", "CERTIFICATE", der)
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err = x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "member"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, ca, &own.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	certFile := write("member.pem", "CERTIFICATE", der)
	if der, err = x509.MarshalPKCS8PrivateKey(own); err != nil {
		t.Fatal(err)
	}
	return []string{"--peer-cert", certFile, "--peer-key", write("member.key", "PRIVATE KEY", der), "--peer-ca", caFile}
}

// startSecureGroup starts a cluster of three over mutual TLS, without proxies: they
// could not read who connects.
func startSecureGroup(t *testing.T) *group {
	t.Helper()
	flags := certificates(t, t.TempDir())
	g := &group{t: t, net: newPartitions(t), dir: t.TempDir()}
	var initial []string
	for _, id := range []string{"n1", "n2", "n3"} {
		m := &member{id: id, peer: freeAddress(t)}
		g.members = append(g.members, m)
		initial = append(initial, id+"="+m.peer)
	}
	for _, m := range g.members {
		g.launch(m, m.peer, append([]string{"--initial-cluster", strings.Join(initial, ",")}, flags...)...)
		m.start()
	}
	return g
}

// TestClusterTLS: members with certificates form a cluster; one with another
// authority's does not join it.
func TestClusterTLS(t *testing.T) {
	g := startSecureGroup(t)
	leader := g.leader()
	g.settled(leader, 3)
	g.run(leader, "lock", "acquire", "a", "--ttl", "1m")
	leader.kill()
	next := g.leader(leader)
	if out := g.run(next, "lock", "get", "a"); !strings.Contains(out, "held, exclusive") {
		t.Errorf("after the fail-over:\n%s", out)
	}
	leader.start()
	g.settled(next, 3)

	stranger := &member{id: "n4", peer: freeAddress(t)}
	g.launch(stranger, stranger.peer, append([]string{"--join", next.address}, certificates(t, t.TempDir())...)...)
	stranger.start()
	time.Sleep(2 * time.Second) // it is a learner by now, which nobody can reach
	s, err := next.status()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range s.Members {
		if m.ID == "n4" && (m.Role == "voter" || m.Healthy) {
			t.Errorf("a node with a certificate of another authority is among the members: %+v", m)
		}
	}
	g.run(next, "cluster", "remove", "n4")
	g.settled(next, 3)
}
