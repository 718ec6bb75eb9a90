// Package httpfence carries passes over HTTP: a middleware for servers that
// turns stale writers away, and a transport for clients that shows the pass of
// a lock with every request.
//
// A pass travels in three headers. The resource's name is percent-encoded, so
// that any name fits a header; the numbers are decimal.
//
//	Distlock-Resource: orders%2F42
//	Distlock-Token: 8
//	Distlock-Floor: 8
//
// What is refused is answered with a problem+json body (RFC 9457):
//
//	status  type                                 when
//	412     urn:distlock:fence:stale             the pass has been overtaken; with resource, token, stored
//	428     urn:distlock:fence:pass-required     a write came without a pass
//	400     urn:distlock:fence:invalid-pass      no grant can have given this pass, or it cannot be read
//	400     urn:distlock:fence:another-resource  the pass is for another resource than the request's
package httpfence

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"strings"

	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/internal/carry"
)

// The headers of a pass.
const (
	HeaderResource = "Distlock-Resource"
	HeaderToken    = "Distlock-Token"
	HeaderFloor    = "Distlock-Floor"
)

// The types of the problems that requests are refused with.
const (
	TypeStale           = "urn:distlock:fence:stale"
	TypePassRequired    = "urn:distlock:fence:pass-required"
	TypeInvalidPass     = "urn:distlock:fence:invalid-pass"
	TypeAnotherResource = "urn:distlock:fence:another-resource"
)

// Transport shows the pass of a lock with every request, and sends none once
// the lock is known to be lost. It is safe for concurrent use, and must not be
// changed after its first.
type Transport struct {
	Base http.RoundTripper // nil for http.DefaultTransport
	Lock fence.Holder
	// Name of the lock whose pass is shown, and of the resource.
	Name string
}

var _ http.RoundTripper = (*Transport)(nil)

// RoundTrip implements http.RoundTripper. It returns Lock.Err's error for a
// lock that is lost.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	pass, err := carry.Shown(t.Lock, t.Name)
	if err != nil {
		if r.Body != nil {
			r.Body.Close()
		}
		return nil, err
	}
	r = r.Clone(r.Context())
	SetPass(r.Header, t.Name, pass)
	base := t.Base
	if base == nil {
		base = http.DefaultTransport
	}
	return base.RoundTrip(r)
}

// SetPass puts a pass into the headers of a request.
func SetPass(h http.Header, resource string, pass fence.Pass) {
	texts := carry.Texts(resource, pass)
	h.Set(HeaderResource, texts[0])
	h.Set(HeaderToken, texts[1])
	h.Set(HeaderFloor, texts[2])
}

// Middleware stands before a handler and lets a write through only with a pass
// that has not been overtaken.
//
// With a Guard, the handler runs as the guard's write: its answer is kept back
// until the guard has stored the floor, and an answer with a status of 400 or
// above is a write that has failed and stores none. The answer is held in
// memory; the handler's ResponseWriter can do nothing but write. A guard that
// serializes writes (fence.Memory does) is held for as long as the handler
// runs: read the body before it where clients are slow, and bound the time.
//
// Without one, the handler finds the pass by FromContext, gives it to the guard
// of the store that it writes to, and lets WriteError answer for what that
// refuses. This is the way for a store that many servers share.
//
// A request whose method is safe (GET, HEAD, OPTIONS, TRACE) needs no pass. If
// it brings one, the floor is raised before it is answered: what a holder reads
// so, nobody it has replaced can change afterwards.
type Middleware struct {
	Guard fence.Guard[func() error]
	// Resource names the resource that a request is about. Set it wherever the
	// request tells: a pass for another resource is refused then. Without it
	// the header is believed, and the holder of any lock may write anything.
	Resource func(*http.Request) string
}

// Wrap puts the middleware before next.
func (m Middleware) Wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		safe := r.Method == http.MethodGet || r.Method == http.MethodHead || r.Method == http.MethodOptions || r.Method == http.MethodTrace
		if safe && r.Header.Values(HeaderResource) == nil && r.Header.Values(HeaderToken) == nil && r.Header.Values(HeaderFloor) == nil {
			next.ServeHTTP(w, r)
			return
		}
		resource, pass, p := read(r.Header)
		if p == nil && m.Resource != nil {
			if own := m.Resource(r); own != resource {
				p = &problem{Type: TypeAnotherResource, Title: "The pass is for another resource", Status: http.StatusBadRequest,
					Detail: fmt.Sprintf("the request is about %q, and its pass for %q", own, resource), Resource: own}
			}
		}
		if p != nil {
			p.write(w)
			return
		}
		ctx := context.WithValue(r.Context(), key{}, carried{resource, pass})
		r = r.WithContext(ctx)
		if m.Guard == nil {
			next.ServeHTTP(w, r)
			return
		}
		if safe {
			if err := m.Guard.Raise(ctx, resource, pass); err != nil {
				refuse(w, err)
				return
			}
			next.ServeHTTP(w, r)
			return
		}
		answer := recorder{header: make(http.Header)}
		failed := errors.New("httpfence: the handler has failed")
		err := m.Guard.Write(ctx, resource, pass, func() error {
			next.ServeHTTP(&answer, r)
			if answer.status >= 400 {
				return failed
			}
			return nil
		})
		if err != nil && !errors.Is(err, failed) {
			refuse(w, err)
			return
		}
		answer.send(w)
	})
}

type key struct{}

type carried struct {
	resource string
	pass     fence.Pass
}

// FromContext is the pass that a request behind Middleware has brought, and
// the resource it is for; false for a safe request without one.
func FromContext(ctx context.Context) (resource string, pass fence.Pass, ok bool) {
	c, ok := ctx.Value(key{}).(carried)
	return c.resource, c.pass, ok
}

// WriteError answers a request that a guard has refused, and reports whether
// it did: an error of another kind is the caller's to answer.
func WriteError(w http.ResponseWriter, err error) bool {
	var stale *fence.StaleError
	switch {
	case errors.As(err, &stale):
		(&problem{Type: TypeStale, Title: "The pass has been overtaken", Status: http.StatusPreconditionFailed,
			Detail: stale.Error(), Resource: stale.Resource, Token: stale.Token, Stored: stale.Stored}).write(w)
	case errors.Is(err, fence.ErrInvalidPass):
		invalid(err.Error()).write(w)
	default:
		return false
	}
	return true
}

func refuse(w http.ResponseWriter, err error) {
	if !WriteError(w, err) {
		(&problem{Type: "about:blank", Title: http.StatusText(http.StatusInternalServerError), Status: http.StatusInternalServerError,
			Detail: "the guard has failed"}).write(w) // its error may tell too much
	}
}

// ErrorFrom is the refusal that a response tells of, as a guard would return
// it: a *fence.StaleError, or an error that is fence.ErrInvalidPass. It is nil
// for any other response. The response's body can be read afterwards as before.
func ErrorFrom(resp *http.Response) error {
	if mediaType, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err != nil || mediaType != problemJSON ||
		resp.StatusCode != http.StatusPreconditionFailed && resp.StatusCode != http.StatusBadRequest {
		return nil
	}
	const most = 1 << 20 // a name may take 10 KiB, and more where it is escaped
	head, err := io.ReadAll(io.LimitReader(resp.Body, most))
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(head), resp.Body), resp.Body}
	var p problem
	if err != nil || json.Unmarshal(head, &p) != nil {
		return nil
	}
	switch p.Type {
	case TypeStale:
		return &fence.StaleError{Resource: p.Resource, Token: p.Token, Stored: p.Stored}
	case TypeInvalidPass:
		return fmt.Errorf("%s: %w", p.Detail, fence.ErrInvalidPass)
	}
	return nil
}

// read takes the pass out of a request's headers.
func read(h http.Header) (resource string, pass fence.Pass, p *problem) {
	resource, pass, err := carry.Read([3]string{HeaderResource, HeaderToken, HeaderFloor}, h.Values)
	var missing *carry.MissingError
	switch {
	case errors.As(err, &missing):
		return "", fence.Pass{}, &problem{Type: TypePassRequired, Title: "A pass is required", Status: http.StatusPreconditionRequired,
			Detail: "the request has no header " + missing.Key}
	case err != nil:
		return "", fence.Pass{}, invalid(err.Error())
	}
	return resource, pass, nil
}

const problemJSON = "application/problem+json"

type problem struct {
	Type     string      `json:"type"`
	Title    string      `json:"title"`
	Status   int         `json:"status"`
	Detail   string      `json:"detail,omitempty"`
	Resource string      `json:"resource,omitempty"`
	Token    fence.Token `json:"token,omitempty"`
	Stored   fence.Token `json:"stored,omitempty"`
}

func invalid(detail string) *problem {
	return &problem{Type: TypeInvalidPass, Title: "Not a pass of any grant", Status: http.StatusBadRequest, Detail: strings.ToValidUTF8(detail, "?")}
}

func (p *problem) write(w http.ResponseWriter) {
	body, err := json.Marshal(p)
	if err != nil {
		panic(err) // strings and numbers
	}
	w.Header().Set("Content-Type", problemJSON)
	w.WriteHeader(p.Status)
	w.Write(append(body, '\n'))
}

// recorder keeps an answer back. Only the handler's goroutine may use it.
type recorder struct {
	header http.Header // the handler's
	sent   http.Header // as it was when the status was written
	status int         // 0 until it was written
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header { return r.header }

func (r *recorder) WriteHeader(status int) {
	if r.status == 0 && status >= 200 { // informational ones are dropped
		r.status, r.sent = status, r.header.Clone()
	}
}

func (r *recorder) Write(p []byte) (int, error) {
	r.WriteHeader(http.StatusOK)
	return r.body.Write(p)
}

func (r *recorder) send(w http.ResponseWriter) {
	r.WriteHeader(http.StatusOK)
	maps.Copy(w.Header(), r.sent)
	w.WriteHeader(r.status)
	w.Write(r.body.Bytes())
}
