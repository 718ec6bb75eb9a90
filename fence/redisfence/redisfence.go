// Package redisfence guards what stands in Redis, with one Lua script that
// compares, raises and writes in one step. It works with any client, through
// one method, and brings none.
//
//	guard := redisfence.New(redisfence.EvalFunc(func(ctx context.Context, script string, keys []string, args ...any) (any, error) {
//		return client.Eval(ctx, script, keys, args...).Result() // go-redis
//	}))
//	err := guard.Write(ctx, "orders/42", lock.Pass(), []redisfence.Command{
//		redisfence.Do("SET", guard.Key("orders/42", "total"), 50),
//	})
//
// # Keys
//
// In a Redis Cluster all keys of a script have to be in one slot. Key makes a
// key that is in the slot of its resource's floor; any other with the same hash
// tag will do too.
//
// # What Redis promises
//
// The script is one step for all other clients, and for what is written to
// disk. Whether it outlasts a crash or a fail-over is up to the configuration,
// floor and data alike: appendonly yes with appendfsync always loses nothing
// that was acknowledged; replication is asynchronous, and a fail-over may lose
// both the last writes and their floors, after which an old pass is let in
// again. Floors have no expiry: choose a maxmemory-policy that evicts only keys
// with one (noeviction, volatile-*), and never FLUSHDB.
package redisfence

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/distlock/distlock/fence"
)

// Evaler runs a Lua script, as EVAL does. Lists come back as []any, and bulk
// strings as string or []byte. It may well use EVALSHA.
type Evaler interface {
	Eval(ctx context.Context, script string, keys []string, args ...any) (any, error)
}

// EvalFunc is a function as an Evaler.
type EvalFunc func(ctx context.Context, script string, keys []string, args ...any) (any, error)

// Eval calls f.
func (f EvalFunc) Eval(ctx context.Context, script string, keys []string, args ...any) (any, error) {
	return f(ctx, script, keys, args...)
}

// Command is a Redis command that has one key, its first argument.
type Command struct {
	Name string
	Key  string
	Args []any // what follows the key: strings, []byte, numbers
}

// Do makes a Command: Do("SET", key, "text"), Do("HSET", key, "field", 7).
func Do(name, key string, args ...any) Command { return Command{Name: name, Key: key, Args: args} }

// Guard guards resources in Redis. All methods are safe for concurrent use as
// far as the Evaler's are.
type Guard struct{ redis Evaler }

var _ fence.Guard[[]Command] = (*Guard)(nil)

// New guards through the client e.
func New(e Evaler) *Guard { return &Guard{redis: e} }

// Key is a key for data of the resource, in the slot of its floor.
func (g *Guard) Key(resource, suffix string) string { return "{" + tag(resource) + "}:" + suffix }

// FloorKey is where the resource's floor is stored, in decimal.
func (g *Guard) FloorKey(resource string) string { return "fence:{" + tag(resource) + "}" }

// tag is the resource's hash tag, which braces would end too early: names with
// one, and those that look like what they become, are taken by their hash.
func tag(resource string) string {
	const hashed = "sha256:"
	if resource != "" && !strings.ContainsAny(resource, "{}") && !strings.HasPrefix(resource, hashed) {
		return resource
	}
	return fmt.Sprintf("%s%x", hashed, sha256.Sum256([]byte(resource)))
}

// script takes the floor's key and a key per command; the token, the floor,
// and per command its name, the number of its arguments, and these. It answers
// with a list: the floor stored before, and each command's reply. Tokens stay
// strings, since Lua's numbers print with 14 digits; to compare, its doubles
// are exact up to 2^53, which no token reaches.
//
// The floor is stored first, so that nothing that fails it can come after a
// write; and is taken back when the first command fails, which then has changed
// nothing.
const script = `
local before = redis.call('GET', KEYS[1])
local stored = before or '0'
if tonumber(ARGV[1]) < tonumber(stored) then
  return {stored}
end
local raised = tonumber(ARGV[2]) > tonumber(stored)
if raised then
  redis.call('SET', KEYS[1], ARGV[2])
end
local replies = {stored}
local at = 3
for i = 2, #KEYS do
  local n = tonumber(ARGV[at + 1])
  local reply = redis.pcall(ARGV[at], KEYS[i], unpack(ARGV, at + 2, at + 1 + n))
  if type(reply) == 'table' and reply.err then
    if i == 2 and raised then
      if before then
        redis.call('SET', KEYS[1], before)
      else
        redis.call('DEL', KEYS[1])
      end
    end
    return reply
  end
  replies[i] = reply
  at = at + 2 + n
end
return replies
`

// Write runs the commands in order if pass may still write, as fence.Guard
// describes it. Redis takes nothing back: when a command fails, those before it
// have happened, and the floor stands; when the first one fails, nothing has
// happened. The keys of all commands have to be in the slot of FloorKey.
func (g *Guard) Write(ctx context.Context, resource string, pass fence.Pass, commands []Command) error {
	_, err := g.Do(ctx, resource, pass, commands...)
	return err
}

// Do is Write that also answers with the commands' replies, in order.
func (g *Guard) Do(ctx context.Context, resource string, pass fence.Pass, commands ...Command) ([]any, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	if _, err := fence.Next(resource, 0, pass); err != nil {
		return nil, err
	}
	keys := []string{g.FloorKey(resource)}
	args := []any{pass.Token.String(), pass.Floor.String()}
	for _, c := range commands {
		keys = append(keys, c.Key)
		args = append(append(args, c.Name, len(c.Args)), c.Args...)
	}
	reply, err := g.redis.Eval(ctx, script, keys, args...)
	if err != nil {
		return nil, err
	}
	replies, ok := reply.([]any)
	if !ok || len(replies) == 0 {
		return nil, fmt.Errorf("redisfence: the script answers %T, in place of a list", reply)
	}
	stored, err := number(replies[0])
	if err != nil {
		return nil, fmt.Errorf("redisfence: the floor in %s: %w", g.FloorKey(resource), err)
	}
	if pass.Token < stored {
		return nil, &fence.StaleError{Resource: resource, Token: pass.Token, Stored: stored}
	}
	if len(replies) != 1+len(commands) {
		return nil, fmt.Errorf("redisfence: %d replies to %d commands", len(replies)-1, len(commands))
	}
	return replies[1:], nil
}

// Raise stores the higher floor without writing, as fence.Guard describes it.
func (g *Guard) Raise(ctx context.Context, resource string, pass fence.Pass) error {
	return g.Write(ctx, resource, pass, nil)
}

func number(v any) (fence.Token, error) {
	var s string
	switch v := v.(type) {
	case string:
		s = v
	case []byte:
		s = string(v)
	default:
		return 0, fmt.Errorf("%T", v)
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err == nil && fence.Token(n) > fence.MaxToken {
		err = errors.New("above all tokens")
	}
	return fence.Token(n), err
}
