package storetest

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/distlock/distlock/fence/redisfence"
)

// TestRedisScript: what one script does when some of it cannot be done.
func TestRedisScript(t *testing.T) {
	ctx := t.Context()
	v := newValues(openRedis(t, redisServer))
	n, l := v.guard.Key("r", "number"), v.guard.Key("r", "list")

	replies, err := v.guard.Do(ctx, "r", pass(5), redisfence.Do("INCRBY", n, 40), redisfence.Do("GET", n), redisfence.Do("GET", l), redisfence.Do("RPUSH", l, "a", "b"), redisfence.Do("DEL", l))
	if want := []any{int64(40), "40", nil, int64(2), int64(1)}; err != nil || !reflect.DeepEqual(replies, want) {
		t.Errorf("replies %v, %v, want %v", replies, err, want)
	}

	floor := func(want string) {
		t.Helper()
		if got, err := v.redis.Get(ctx, v.guard.FloorKey("r")).Result(); err != nil || got != want {
			t.Errorf("the floor is %s, %v, want %s", got, err, want)
		}
	}
	// The first fails: nothing has happened.
	if _, err := v.guard.Do(ctx, "r", pass(6), redisfence.Do("LPUSH", n, "x"), redisfence.Do("INCRBY", n, 1)); err == nil || !strings.Contains(err.Error(), "WRONGTYPE") {
		t.Error(err)
	}
	if _, err := v.guard.Do(ctx, "r", pass(6), redisfence.Do("NONSENSE", n)); err == nil {
		t.Error("an unknown command was run")
	}
	floor("5")
	// The second fails: the first has happened, and is guarded.
	if _, err := v.guard.Do(ctx, "r", pass(7), redisfence.Do("INCRBY", n, 1), redisfence.Do("LPUSH", n, "x")); err == nil || !strings.Contains(err.Error(), "WRONGTYPE") {
		t.Error(err)
	}
	floor("7")
	if got, err := v.redis.Get(ctx, n).Result(); err != nil || got != "41" {
		t.Errorf("the number is %s, %v", got, err)
	}
	if err := v.guard.Raise(ctx, "r", pass(6)); !isStale(err, 6, 7) {
		t.Error(err)
	}

	// What is no floor is never taken for 0.
	if err := v.redis.Set(ctx, v.guard.FloorKey("s"), "seven", 0).Err(); err != nil {
		t.Fatal(err)
	}
	if err := v.redis.RPush(ctx, v.guard.FloorKey("t"), "7").Err(); err != nil {
		t.Fatal(err)
	}
	for _, resource := range []string{"s", "t"} {
		if err := v.Write(ctx, resource, pass(9), "x"); err == nil {
			t.Errorf("%s: a write was accepted over a floor that is none", resource)
		}
		if text, err := v.Read(ctx, resource); err != nil || text != "" {
			t.Errorf("%s: %q, %v", resource, text, err)
		}
	}
}

// TestRedisCluster: keys of Key are in one slot, whatever the resource's name,
// and Redis itself refuses others.
func TestRedisCluster(t *testing.T) {
	ctx := t.Context()
	address := clusterServer.get(t).DSN
	admin := redis.NewClient(&redis.Options{Addr: address})
	defer admin.Close()
	if err := errors.Join(admin.FlushAll(ctx).Err(), admin.ClusterResetHard(ctx).Err(), admin.Do(ctx, "CLUSTER", "ADDSLOTSRANGE", 0, 16383).Err()); err != nil {
		t.Fatal(err)
	}
	for { // it takes it a moment to notice
		info, err := admin.ClusterInfo(ctx).Result()
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(info, "cluster_state:ok") {
			break
		}
	}
	c := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{address}})
	defer c.Close()
	v := newValues(c)
	for _, resource := range []string{"r", "", "a b", "{a}:b", "}", "{}x", "a\x00b", strings.Repeat("n", 10<<10)} {
		if err := v.Write(ctx, resource, pass(7), resource+"'s"); err != nil {
			t.Errorf("%.20q: %v", resource, err)
		}
		if err := v.Write(ctx, resource, pass(6), "late"); !isStale(err, 6, 7) {
			t.Errorf("%.20q: %v", resource, err)
		}
		if text, err := v.Read(ctx, resource); err != nil || text != resource+"'s" {
			t.Errorf("%.20q: %.20q, %v", resource, text, err)
		}
	}
	if err := v.guard.Write(ctx, "r", pass(8), []redisfence.Command{redisfence.Do("SET", "elsewhere", "x")}); err == nil || !strings.Contains(err.Error(), "slot") {
		t.Errorf("a key in another slot: %v", err)
	}
}
