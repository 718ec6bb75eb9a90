package storetest

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/redis/go-redis/v9"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/filefence"
	"github.com/distlock/distlock/fence/grpcfence"
	"github.com/distlock/distlock/fence/httpfence"
	"github.com/distlock/distlock/fence/sqlfence"
)

// spec is where a resource is: enough for another process to write to it.
type spec struct {
	Kind     string // "PostgreSQL row", "Redis", ...
	Guarded  bool
	DSN      string // also a URL, an address or a directory
	Table    string // SQL: of the texts
	Floors   string // SQL: of the guard
	Resource string
}

func (s spec) String() string {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// target is the resource as one process sees it.
type target interface {
	write(ctx context.Context, pass fence.Pass, s string) error
	read(ctx context.Context) (string, error)
	close() error
}

// kinds are all the stores and ways to guard them.
var kinds = []string{
	"PostgreSQL row", "PostgreSQL column", "MariaDB row", "MariaDB column", "SQLite row", "SQLite column", "Redis", "file", "HTTP", "gRPC",
}

// connect opens a target.
func connect(s spec) (target, error) {
	switch s.Kind {
	case "Redis":
		c := redis.NewClient(&redis.Options{Addr: s.DSN})
		return redisTarget{s, newValues(c)}, nil
	case "file":
		g, err := filefence.New(s.DSN)
		return fileTarget{s, g}, err
	case "HTTP":
		return httpTarget{s, &http.Transport{}}, nil
	case "gRPC":
		conn, err := grpc.NewClient(s.DSN, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithUnaryInterceptor(grpcfence.UnaryClientInterceptor()))
		return grpcTarget{s, conn}, err
	}
	name, way, _ := strings.Cut(s.Kind, " ")
	i := slices.IndexFunc(databases, func(d *database) bool { return d.name == name })
	if i < 0 {
		return nil, fmt.Errorf("unknown kind %q", s.Kind)
	}
	on := databases[i]
	db, err := sql.Open(on.driver, s.DSN)
	if err != nil {
		return nil, err
	}
	x := &texts{db: db, on: on, table: s.Table, column: sqlfence.Column{Dialect: on.dialect, Table: s.Table, Key: "id"}}
	x.guard, err = sqlfence.New(db, on.dialect, s.Floors)
	return sqlTarget{s, x, way == "column"}, err
}

type sqlTarget struct {
	spec
	*texts
	column bool
}

func (x sqlTarget) write(ctx context.Context, pass fence.Pass, s string) error {
	switch {
	case !x.Guarded:
		return x.set(ctx, x.db, x.Resource, s)
	case x.column:
		return columns{x.texts}.Write(ctx, x.Resource, pass, s)
	default:
		return rows{x.texts}.Write(ctx, x.Resource, pass, s)
	}
}

func (x sqlTarget) read(ctx context.Context) (string, error) { return x.texts.Read(ctx, x.Resource) }
func (x sqlTarget) close() error                             { return x.db.Close() }

type redisTarget struct {
	spec
	values
}

func (r redisTarget) write(ctx context.Context, pass fence.Pass, s string) error {
	if !r.Guarded {
		return r.redis.Set(ctx, r.key(r.Resource), s, 0).Err()
	}
	return r.Write(ctx, r.Resource, pass, s)
}

func (r redisTarget) read(ctx context.Context) (string, error) { return r.Read(ctx, r.Resource) }
func (r redisTarget) close() error                             { return r.redis.Close() }

type fileTarget struct {
	spec
	guard *filefence.Guard
}

func (f fileTarget) write(ctx context.Context, pass fence.Pass, s string) error {
	if !f.Guarded {
		return os.WriteFile(filepath.Join(f.DSN, f.Resource), []byte(s), 0o600)
	}
	return f.guard.Write(ctx, f.Resource, pass, filefence.Bytes([]byte(s), 0o600))
}

func (f fileTarget) read(context.Context) (string, error) {
	b, err := os.ReadFile(f.guard.Path(f.Resource))
	return string(b), err
}
func (f fileTarget) close() error { return nil }

// shown is a lock that does not look at the clock: the process was paused
// after it had.
type shown fence.Pass

func (s shown) PassFor(string) (fence.Pass, bool) { return fence.Pass(s), true }
func (s shown) Err() error                        { return nil }

type httpTarget struct {
	spec
	base *http.Transport
}

func (h httpTarget) write(ctx context.Context, pass fence.Pass, s string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, h.DSN, strings.NewReader(s))
	if err != nil {
		return err
	}
	c := http.Client{Transport: &httpfence.Transport{Base: h.base, Lock: shown(pass), Name: h.Resource}}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := httpfence.ErrorFrom(resp); err != nil || resp.StatusCode == http.StatusOK {
		return err
	}
	return errors.New(resp.Status)
}

func (h httpTarget) read(ctx context.Context) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.DSN, nil)
	if err != nil {
		return "", err
	}
	resp, err := h.base.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func (h httpTarget) close() error { h.base.CloseIdleConnections(); return nil }

type grpcTarget struct {
	spec
	conn *grpc.ClientConn
}

func (g grpcTarget) call(ctx context.Context, method, s string) (string, error) {
	reply := new(structpb.Value)
	err := g.conn.Invoke(ctx, "/Document/"+method, structpb.NewStringValue(s), reply)
	return reply.GetStringValue(), err
}

func (g grpcTarget) write(ctx context.Context, pass fence.Pass, s string) error {
	_, err := g.call(grpcfence.WithLock(ctx, shown(pass), g.Resource), "Set", s)
	return err
}

func (g grpcTarget) read(ctx context.Context) (string, error) { return g.call(ctx, "Get", "") }
func (g grpcTarget) close() error                             { return g.conn.Close() }

// newTarget makes a fresh resource of the kind.
func newTarget(t testing.TB, kind string, guarded bool) spec {
	t.Helper()
	s := spec{Kind: kind, Guarded: guarded, Resource: fmt.Sprintf("document-%d", tables.Add(1))}
	switch kind {
	case "Redis":
		s.DSN = redisServer.get(t).DSN
	case "file":
		s.DSN = t.TempDir()
	case "HTTP":
		var h http.Handler = &document{}
		if guarded {
			h = httpfence.Middleware{Guard: new(fence.Memory), Resource: func(*http.Request) string { return s.Resource }}.Wrap(h)
		}
		srv := httptest.NewServer(h)
		t.Cleanup(srv.Close)
		s.DSN = srv.URL
	case "gRPC":
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var options []grpc.ServerOption
		if guarded {
			options = append(options, grpc.UnaryInterceptor(grpcfence.Interceptor{
				Guard: new(fence.Memory), Resource: func(context.Context, string, any) string { return s.Resource },
				Reads: func(method string) bool { return method == "/Document/Get" },
			}.Unary()))
		}
		srv := grpc.NewServer(options...)
		srv.RegisterService(&documentService, &document{})
		go srv.Serve(l)
		t.Cleanup(srv.Stop)
		s.DSN = l.Addr().String()
	default:
		name, _, _ := strings.Cut(kind, " ")
		on := databases[slices.IndexFunc(databases, func(d *database) bool { return d.name == name })]
		s.DSN = on.dsn(t)
		x := newTexts(t, on, openDSN(t, on.driver, s.DSN))
		s.Table, s.Floors = x.table, strings.Replace(x.table, "texts", "fence", 1)
	}
	return s
}

// document is a text that is written over HTTP or gRPC.
type document struct {
	mu   sync.Mutex
	text string
}

func (d *document) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if r.Method == http.MethodPut {
		d.text = string(body)
		return
	}
	io.WriteString(w, d.text)
}

func (d *document) call(_ context.Context, method string, req *structpb.Value) (any, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if method == "Set" {
		d.text = req.GetStringValue()
	}
	return structpb.NewStringValue(d.text), nil
}

func documentMethod(name string) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: name, Handler: func(srv any, ctx context.Context, dec func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		req := new(structpb.Value)
		if err := dec(req); err != nil {
			return nil, err
		}
		handle := func(ctx context.Context, req any) (any, error) {
			return srv.(*document).call(ctx, name, req.(*structpb.Value))
		}
		if interceptor == nil {
			return handle(ctx, req)
		}
		return interceptor(ctx, req, &grpc.UnaryServerInfo{Server: srv, FullMethod: "/Document/" + name}, handle)
	}}
}

var documentService = grpc.ServiceDesc{
	ServiceName: "Document", HandlerType: (*any)(nil), Methods: []grpc.MethodDesc{documentMethod("Set"), documentMethod("Get")},
}
