// Sets a document by gRPC.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/distlock/distlock/client"
	"github.com/distlock/distlock/fence"
	"github.com/distlock/distlock/fence/grpcfence"
)

// set is the server's only method. The guard lets one call at a time in.
func set(_ context.Context, req *wrapperspb.StringValue) (*emptypb.Empty, error) {
	document = req.GetValue()
	return &emptypb.Empty{}, nil
}

var document string

func main() {
	ctx := context.Background()
	locks, err := client.New([]string{os.Getenv("DISTLOCK")}) // localhost:50051
	check(err)
	defer locks.Close()

	l, err := net.Listen("tcp", "localhost:0")
	check(err)
	srv := grpc.NewServer(grpc.UnaryInterceptor(grpcfence.Interceptor{
		Guard:    new(fence.Memory), // right for a document in memory
		Resource: func(context.Context, string, any) string { return "document" },
	}.Unary()))
	srv.RegisterService(&service, nil)
	go srv.Serve(l)
	defer srv.Stop()

	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUnaryInterceptor(grpcfence.UnaryClientInterceptor()))
	check(err)
	defer conn.Close()
	call := func(ctx context.Context, text string) error {
		err := conn.Invoke(ctx, "/Documents/Set", wrapperspb.String(text), new(emptypb.Empty))
		var stale *fence.StaleError
		if errors.As(err, &stale) {
			return stale // the status is FAILED_PRECONDITION, its reason STALE_TOKEN
		}
		return err
	}

	// Alice holds the lock, and nothing renews it, as if she were paused here.
	alice, err := locks.Acquire(ctx, "document", client.TTL(time.Second), client.NoRenew())
	check(err)
	// Bob is granted the lock once her lease has ended. Then both write. Alice
	// shows her pass herself: WithLock would send nothing, now that her client
	// knows that her lock is lost.
	bob, err := locks.Acquire(ctx, "document")
	check(err)
	fmt.Println("bob:", call(grpcfence.WithLock(ctx, bob, "document"), "bob's"))
	fmt.Println("alice:", call(grpcfence.WithPass(ctx, "document", alice.Pass()), "alice's"))
	fmt.Println(document)
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

// What generated code has, for one method.
var service = grpc.ServiceDesc{ServiceName: "Documents", HandlerType: (*any)(nil), Methods: []grpc.MethodDesc{{
	MethodName: "Set",
	Handler: func(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		req := new(wrapperspb.StringValue)
		if err := decode(req); err != nil {
			return nil, err
		}
		return interceptor(ctx, req, &grpc.UnaryServerInfo{FullMethod: "/Documents/Set"}, func(ctx context.Context, req any) (any, error) {
			return set(ctx, req.(*wrapperspb.StringValue))
		})
	},
}}}
