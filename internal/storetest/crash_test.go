package storetest

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/fencetest"
)

// TestStoreCrashes ends the store in the middle of many writes. Afterwards each
// resource holds the text and the floor of one and the same write, and that of
// the last one that was acknowledged or of one after it.
func TestStoreCrashes(t *testing.T) {
	sqlSubject := func(on *database, way func(*texts) fencetest.Subject) func(*testing.T, string) fencetest.Subject {
		return func(t *testing.T, dsn string) fencetest.Subject {
			return way(newTexts(t, on, openDSN(t, on.driver, dsn)))
		}
	}
	row := func(x *texts) fencetest.Subject { return rows{x} }
	column := func(x *texts) fencetest.Subject { return columns{x} }
	for _, c := range []struct {
		name   string
		server *lazy
		open   func(t *testing.T, dsn string) fencetest.Subject
	}{
		{"PostgreSQL row", durablePostgres, sqlSubject(databases[0], row)},
		{"PostgreSQL column", durablePostgres, sqlSubject(databases[0], column)},
		{"MariaDB row", durableMariaDB, sqlSubject(databases[1], row)},
		{"MariaDB column", durableMariaDB, sqlSubject(databases[1], column)},
		{"Redis", durableRedis, func(t *testing.T, dsn string) fencetest.Subject {
			r := redis.NewClient(&redis.Options{Addr: dsn, MaxRetries: -1})
			t.Cleanup(func() { r.Close() })
			return newValues(r)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			srv := c.server.get(t)
			s := c.open(t, srv.DSN)
			const writers, enough = 8, 400 // writes acknowledged before the crash
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			var (
				acked [writers]fence.Token
				ended [writers]error
				wg    sync.WaitGroup
				begun = make(chan struct{}, enough)
				first = make(chan struct{}, writers) // of each, which has to connect
			)
			run := tables.Add(1)
			resource := func(i int) string { return fmt.Sprintf("crash-%d/%d", run, i) }
			for i := range writers {
				wg.Go(func() {
					for token := fence.Token(1); ; token++ {
						if err := s.Write(ctx, resource(i), pass(token), token.String()); err != nil {
							ended[i] = err
							return
						}
						acked[i] = token
						if token == 1 {
							first <- struct{}{}
						}
						select {
						case begun <- struct{}{}:
						default:
						}
					}
				})
			}
			for _, wait := range []struct {
				n  int
				on chan struct{}
			}{{writers, first}, {enough, begun}} {
				for range wait.n {
					select {
					case <-wait.on:
					case <-ctx.Done():
						t.Fatal("the writers are too slow")
					}
				}
			}
			if err := srv.Crash(); err != nil {
				t.Fatal(err)
			}
			wg.Wait()
			for i, err := range ended {
				if errors.As(err, new(*fence.StaleError)) {
					t.Errorf("writer %d ended before the crash: %v", i, err)
				}
			}
			if err := srv.Restart(); err != nil {
				t.Fatal(err)
			}
			for i := range writers {
				text, err := s.Read(ctx, resource(i))
				for range 20 { // connections that died with the server
					if err == nil {
						break
					}
					text, err = s.Read(ctx, resource(i))
				}
				if err != nil {
					t.Fatal(err)
				}
				written, err := strconv.ParseUint(text, 10, 64)
				token := fence.Token(written)
				if err != nil || token < acked[i] || token > acked[i]+1 {
					t.Errorf("writer %d: the text is %q, and %d was acknowledged", i, text, acked[i])
				}
				if token < 2 {
					continue
				}
				var stale *fence.StaleError
				if err := s.Write(ctx, resource(i), pass(token-1), "late"); !errors.As(err, &stale) || stale.Stored != token {
					t.Errorf("writer %d: the text is %q; a write by %d: %v", i, text, token-1, err)
				}
			}
		})
	}
}
