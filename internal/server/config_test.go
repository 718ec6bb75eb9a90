package server

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// TestConfigsThatAreWrong: each is refused, with one line that names its fields.
func TestConfigsThatAreWrong(t *testing.T) {
	for field, change := range map[string]func(*Config){
		"Port":            func(c *Config) { c.Port = 1 << 16 },
		"Address":         func(c *Config) { c.Address = "localhost:1" },
		"MaxConnections":  func(c *Config) { c.MaxConnections = -1 },
		"MaxMessageBytes": func(c *Config) { c.MaxMessageBytes = 1 << 30 },
		"MinTTL":          func(c *Config) { c.Bounds.MinTTL = 48 * time.Hour },
		"MaxWorkers":      func(c *Config) { c.MaxWorkers = -1 },
		"MaxLocks":        func(c *Config) { c.Bounds.MaxLocks = -1 },
		"DrainTimeout":    func(c *Config) { c.DrainTimeout = -1 },
		"MetricsAddress":  func(c *Config) { c.Pprof = true },
		"PeerAddress":     func(c *Config) { c.Join = "a:1" },
		"PeerListen":      func(c *Config) { c.PeerListen = "1" },
		"NodeID":          func(c *Config) { c.PeerAddress, c.Join = "a:1", "b:1" },
		"Join": func(c *Config) {
			c.NodeID, c.PeerAddress, c.Join, c.InitialCluster = "n1", "a:1", "b:1", map[string]string{"n1": "a:1"}
		},
		"InitialCluster": func(c *Config) {
			c.NodeID, c.PeerAddress, c.InitialCluster = "n1", "a:1", map[string]string{"n1": "b:1"}
		},
		"InMemory":        func(c *Config) { c.PeerAddress, c.InMemory = "a:1", true },
		"ElectionTimeout": func(c *Config) { c.ElectionTimeout = time.Millisecond },
	} {
		var c Config
		change(&c)
		err := c.normalize()
		var wrong *FieldError
		if !errors.As(err, &wrong) || !strings.Contains(err.Error(), field) || strings.ContainsAny(err.Error(), "{}\n") {
			t.Errorf("%s: %v", field, err)
			continue
		}
		if text := wrong.Named(func(field string) string { return "<" + field + ">" }); !strings.Contains(text, "<"+field+">") {
			t.Errorf("%s: %s", field, text)
		}
	}
	var c Config
	if err := c.normalize(); err != nil {
		t.Error(err)
	}
}
