package httpfence_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/fencetest"
	"github.com/distlock/distlock/fence/httpfence"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// texts is a handler that keeps a text per resource, named by the query.
type texts struct {
	mu sync.Mutex
	of map[string]string
}

func named(r *http.Request) string { return r.URL.Query().Get("name") }

func (s *texts) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case r.Method != http.MethodPut:
		io.WriteString(w, s.of[named(r)])
	case r.Header.Get("Fail") != "":
		http.Error(w, "no", http.StatusInsufficientStorage)
	default:
		s.of[named(r)] = string(body)
		w.Header().Set("Etag", "x")
		w.WriteHeader(http.StatusCreated)
		io.WriteString(w, "done")
	}
}

// held is a lock on one name.
type held struct {
	name string
	pass fence.Pass
	err  error
}

func (h held) PassFor(name string) (fence.Pass, bool) { return h.pass, name == h.name }
func (h held) Err() error                             { return h.err }

// subject writes and raises over HTTP.
type subject struct {
	url  string
	base *http.Transport
}

func open(t *testing.T, m httpfence.Middleware, h http.Handler) *subject {
	t.Helper()
	srv := httptest.NewServer(m.Wrap(h))
	base := &http.Transport{MaxIdleConnsPerHost: 64}
	t.Cleanup(func() { base.CloseIdleConnections(); srv.Close() })
	return &subject{url: srv.URL, base: base}
}

func (s *subject) do(ctx context.Context, method, resource string, pass *fence.Pass, text, fail string) (status int, body string, err error) {
	req, err := http.NewRequestWithContext(ctx, method, s.url+"/?name="+url.QueryEscape(resource), strings.NewReader(text))
	if err != nil {
		return 0, "", err
	}
	if fail != "" {
		req.Header.Set("Fail", fail)
	}
	c := http.Client{Transport: s.base}
	if pass != nil {
		c.Transport = &httpfence.Transport{Base: s.base, Lock: held{name: resource, pass: *pass}, Name: resource}
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	refused := httpfence.ErrorFrom(resp)
	b, err := io.ReadAll(resp.Body)
	if refused == nil && resp.StatusCode >= 300 {
		refused = fmt.Errorf("%s: %s", resp.Status, b)
	}
	return resp.StatusCode, string(b), errors.Join(err, refused)
}

func (s *subject) Write(ctx context.Context, resource string, pass fence.Pass, text string) error {
	_, _, err := s.do(ctx, http.MethodPut, resource, &pass, text, "")
	return err
}

func (s *subject) Interrupt(ctx context.Context, resource string, pass fence.Pass, text string) error {
	_, _, err := s.do(ctx, http.MethodPut, resource, &pass, text, "yes")
	return err
}

func (s *subject) Raise(ctx context.Context, resource string, pass fence.Pass) error {
	_, _, err := s.do(ctx, http.MethodGet, resource, &pass, "", "")
	return err
}

func (s *subject) Read(ctx context.Context, resource string) (string, error) {
	_, body, err := s.do(ctx, http.MethodGet, resource, nil, "", "")
	return body, err
}

func TestMiddlewareMeetsTheContract(t *testing.T) {
	fencetest.Run(t, func(t *testing.T) fencetest.Subject {
		return open(t, httpfence.Middleware{Guard: new(fence.Memory), Resource: named}, &texts{of: map[string]string{}})
	})
}

// serve is the answer of a guarded store whose resource r has seen token 7.
func serve(t *testing.T, m httpfence.Middleware, method string, h http.Header) *http.Response {
	t.Helper()
	if m.Guard != nil {
		if err := m.Guard.Raise(t.Context(), "r", fence.Pass{Token: 7, Floor: 7}); err != nil {
			t.Fatal(err)
		}
	}
	w := httptest.NewRecorder()
	r := httptest.NewRequestWithContext(t.Context(), method, "/?name=r", strings.NewReader("text"))
	r.Header = h
	m.Wrap(&texts{of: map[string]string{}}).ServeHTTP(w, r)
	return w.Result()
}

func header(resource, token, floor string) http.Header {
	h := http.Header{}
	for name, value := range map[string]string{httpfence.HeaderResource: resource, httpfence.HeaderToken: token, httpfence.HeaderFloor: floor} {
		if value != "-" {
			h.Set(name, value)
		}
	}
	return h
}

func TestRefusals(t *testing.T) {
	twice := header("r", "8", "8")
	twice.Add(httpfence.HeaderToken, "9")
	for _, c := range []struct {
		what   string
		method string
		header http.Header
		status int
		body   map[string]any
	}{
		{"stale", "PUT", header("r", "6", "6"), 412, map[string]any{
			"type": httpfence.TypeStale, "title": "The pass has been overtaken", "status": 412., "resource": "r", "token": 6., "stored": 7.,
			"detail": `resource "r": token 6 is stale, the resource has seen 7`}},
		{"stale raise", "GET", header("r", "6", "6"), 412, nil},
		{"none", "PUT", http.Header{}, 428, map[string]any{
			"type": httpfence.TypePassRequired, "title": "A pass is required", "status": 428., "detail": "the request has no header Distlock-Resource"}},
		{"none, patch", "PATCH", http.Header{}, 428, nil},
		{"none, delete", "DELETE", http.Header{}, 428, nil},
		{"none, post", "POST", http.Header{}, 428, nil},
		{"no token", "PUT", header("r", "-", "8"), 428, nil},
		{"no floor", "PUT", header("r", "8", "-"), 428, nil},
		{"half a pass to read", "GET", header("r", "8", "-"), 428, nil},
		{"token 0", "PUT", header("r", "0", "0"), 400, map[string]any{
			"type": httpfence.TypeInvalidPass, "title": "Not a pass of any grant", "status": 400.,
			"detail": `resource "r": token 0 with floor 0: not a pass of any grant`}},
		{"floor above token", "PUT", header("r", "8", "9"), 400, nil},
		{"token above all", "PUT", header("r", "9007199254740992", "8"), 400, nil},
		{"not a number", "PUT", header("r", "8.0", "8"), 400, nil},
		{"not a floor", "PUT", header("r", "8", "-8"), 400, nil},
		{"not escaped", "PUT", header("%zz", "8", "8"), 400, nil},
		{"two tokens", "PUT", twice, 400, nil},
		{"another's", "PUT", header("s", "8", "8"), 400, map[string]any{
			"type": httpfence.TypeAnotherResource, "title": "The pass is for another resource", "status": 400., "resource": "r",
			"detail": `the request is about "r", and its pass for "s"`}},
		{"right", "PUT", header("r", "8", "8"), 201, nil},
		{"right, to read", "GET", header("r", "8", "8"), 200, nil},
		{"read", "GET", http.Header{}, 200, nil},
	} {
		t.Run(c.what, func(t *testing.T) {
			resp := serve(t, httpfence.Middleware{Guard: new(fence.Memory), Resource: named}, c.method, c.header)
			body, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != c.status {
				t.Fatalf("%s: %s, %v", resp.Status, body, err)
			}
			if c.status >= 400 && resp.Header.Get("Content-Type") != "application/problem+json" {
				t.Errorf("content type %q", resp.Header.Get("Content-Type"))
			}
			var got map[string]any
			if c.body != nil && (json.Unmarshal(body, &got) != nil || !reflect.DeepEqual(got, c.body)) {
				t.Errorf("body %s, want %v", body, c.body)
			}
		})
	}
}

// TestAnswerOfTheHandler comes through as it is, and one that failed stores no
// floor.
func TestAnswerOfTheHandler(t *testing.T) {
	var guard fence.Memory
	m := httpfence.Middleware{Guard: &guard, Resource: named}
	h := header("r", "9", "9")
	h.Set("Fail", "yes")
	resp := serve(t, m, "PUT", h)
	if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusInsufficientStorage || string(body) != "no\n" || guard.Stored("r") != 7 {
		t.Errorf("%s, %q, %v; stored %d", resp.Status, body, err, guard.Stored("r"))
	}
	resp = serve(t, m, "PUT", header("r", "9", "9"))
	if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusCreated || string(body) != "done" ||
		resp.Header.Get("Etag") != "x" || guard.Stored("r") != 9 {
		t.Errorf("%s, %q, %v, %v; stored %d", resp.Status, body, resp.Header, err, guard.Stored("r"))
	}
}

// broken is a guard whose store is down.
type broken struct{}

func (broken) Write(context.Context, string, fence.Pass, func() error) error {
	return errors.New("password wrong")
}
func (broken) Raise(context.Context, string, fence.Pass) error { return errors.New("password wrong") }

func TestGuardThatFails(t *testing.T) {
	for _, method := range []string{"PUT", "GET"} {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(method, "/", nil)
		r.Header = header("r", "9", "9")
		httpfence.Middleware{Guard: broken{}}.Wrap(&texts{of: map[string]string{}}).ServeHTTP(w, r)
		if w.Code != 500 || strings.Contains(w.Body.String(), "password") {
			t.Errorf("%s: %d %s", method, w.Code, w.Body)
		}
	}
}

// TestHandlerWithAGuardOfItsOwn gets the pass, and answers for its guard.
func TestHandlerWithAGuardOfItsOwn(t *testing.T) {
	var guard fence.Memory
	h := httpfence.Middleware{Resource: named}.Wrap(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		resource, pass, ok := httpfence.FromContext(r.Context())
		if !ok {
			io.WriteString(w, "no pass")
			return
		}
		err := guard.Write(r.Context(), resource, pass, func() error { return nil })
		if err != nil && !httpfence.WriteError(w, err) {
			t.Error(err)
		}
	}))
	for _, c := range []struct {
		method string
		header http.Header
		status int
		body   string
	}{
		{"PUT", header("r", "8", "8"), 200, ""},
		{"PUT", header("r", "7", "7"), 412, "stale"},
		{"PUT", http.Header{}, 428, "required"},
		{"GET", http.Header{}, 200, "no pass"},
	} {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(c.method, "/?name=r", nil)
		r.Header = c.header
		h.ServeHTTP(w, r)
		if w.Code != c.status || !strings.Contains(w.Body.String(), c.body) {
			t.Errorf("%s %v: %d %s", c.method, c.header, w.Code, w.Body)
		}
	}
	if httpfence.WriteError(httptest.NewRecorder(), errors.New("another")) {
		t.Error("an error of another kind was answered")
	}
}

// counting counts what is sent and what is closed.
type counting struct{ sent, closed int }

func (c *counting) RoundTrip(*http.Request) (*http.Response, error) {
	c.sent++
	return nil, errors.New("sent")
}
func (c *counting) Read([]byte) (int, error) { return 0, io.EOF }
func (c *counting) Close() error             { c.closed++; return nil }

func TestTransportSendsNothingWithoutTheLock(t *testing.T) {
	lost := errors.New("expired")
	for _, c := range []struct {
		lock held
		want string
	}{
		{held{name: "r", err: lost}, "expired"},
		{held{name: "s"}, `not on "r"`},
	} {
		var base counting
		r := httptest.NewRequest("PUT", "/", &base)
		_, err := (&httpfence.Transport{Base: &base, Lock: c.lock, Name: "r"}).RoundTrip(r)
		if err == nil || !strings.Contains(err.Error(), c.want) || base.sent != 0 || base.closed != 1 {
			t.Errorf("%v; sent %d, closed %d", err, base.sent, base.closed)
		}
	}
}

func TestTransportLeavesTheRequestAlone(t *testing.T) {
	r := httptest.NewRequest("PUT", "/", nil)
	(&httpfence.Transport{Base: new(counting), Lock: held{name: "r", pass: fence.Pass{Token: 8, Floor: 8}}, Name: "r"}).RoundTrip(r)
	if len(r.Header) != 0 {
		t.Errorf("headers %v were added to the caller's request", r.Header)
	}
}

func TestErrorFromOtherAnswers(t *testing.T) {
	for _, c := range []struct {
		status     int
		kind, body string
	}{
		{412, "text/plain", "no"}, {412, "application/problem+json", "{"}, {500, "application/problem+json", `{"type":"urn:distlock:fence:stale"}`},
		{400, "application/problem+json; charset=utf-8", `{"type":"urn:other"}`}, {200, "", ""},
	} {
		resp := &http.Response{StatusCode: c.status, Header: http.Header{"Content-Type": {c.kind}}, Body: io.NopCloser(strings.NewReader(c.body))}
		if err := httpfence.ErrorFrom(resp); err != nil {
			t.Errorf("%v: %v", c, err)
		}
		if b, err := io.ReadAll(resp.Body); err != nil || string(b) != c.body {
			t.Errorf("%v: the body reads %q afterwards, %v", c, b, err)
		}
	}
}

func Example() {
	// The server: a store of texts, guarded. Floors in memory are right for
	// texts in memory, and for nothing that lasts longer.
	guarded := httpfence.Middleware{Guard: new(fence.Memory), Resource: named}.Wrap(&texts{of: map[string]string{}})
	srv := httptest.NewServer(guarded)
	defer srv.Close()

	// Two clients, each with the lock it was granted: in a program, a
	// *client.Lock.
	put := func(lock fence.Holder, text string) {
		c := http.Client{Transport: &httpfence.Transport{Lock: lock, Name: "greeting"}}
		req, _ := http.NewRequest(http.MethodPut, srv.URL+"?name=greeting", strings.NewReader(text))
		resp, err := c.Do(req)
		if err != nil {
			fmt.Println(err)
			return
		}
		defer resp.Body.Close()
		fmt.Println(resp.StatusCode, httpfence.ErrorFrom(resp))
	}
	put(held{name: "greeting", pass: fence.Pass{Token: 8, Floor: 8}}, "bob's")
	put(held{name: "greeting", pass: fence.Pass{Token: 7, Floor: 7}}, "alice's, late")
	http.DefaultClient.CloseIdleConnections()
	// Output:
	// 201 <nil>
	// 412 resource "greeting": token 7 is stale, the resource has seen 8
}
