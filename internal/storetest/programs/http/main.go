// Puts a document to an HTTP server, which keeps it in memory.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"time"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/httpfence"
)

func main() {
	ctx := context.Background()
	locks, err := client.New([]string{os.Getenv("DISTLOCK")}) // localhost:50051
	check(err)
	defer locks.Close()

	// The server. A document in memory may have its floor in memory; one in a
	// store takes the store's guard, and httpfence.FromContext.
	var document []byte // changed in the guard's turn only
	srv := httptest.NewServer(httpfence.Middleware{
		Guard:    new(fence.Memory),
		Resource: func(r *http.Request) string { return strings.TrimPrefix(r.URL.Path, "/") },
	}.Wrap(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		document = body
	})))
	defer srv.Close()

	put := func(pass fence.Pass, text string) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodPut, srv.URL+"/document", strings.NewReader(text))
		if err != nil {
			return err
		}
		// httpfence.Transport does this for a lock, and sends nothing once the
		// client knows that it is lost. Alice below does not look.
		httpfence.SetPass(req.Header, "document", pass)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		return httpfence.ErrorFrom(resp)
	}

	// Alice holds the lock, and nothing renews it, as if she were paused here.
	alice, err := locks.Acquire(ctx, "document", client.TTL(time.Second), client.NoRenew())
	check(err)
	// Bob is granted the lock once her lease has ended. Then both write.
	bob, err := locks.Acquire(ctx, "document")
	check(err)
	fmt.Println("bob:", put(bob.Pass(), "bob's"))
	fmt.Println("alice:", put(alice.Pass(), "alice's"))
	fmt.Println(string(document))
	check(bob.Release(ctx))
	// bob: <nil>
	// alice: resource "document": token 1 is stale, the resource has seen 2
	// bob's
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
