package client

import (
	"context"
	"iter"

	"google.golang.org/grpc"

	"github.com/distlock/distlock/fence"
	pb "github.com/distlock/distlock/proto/distlock/v1"
)

// Get shows a lock. One that nobody holds, waits for or declared is an answer
// too.
func (c *Client) Get(ctx context.Context, name string, opts ...ReadOption) (LockInfo, error) {
	var resp *pb.GetResponse
	err := c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) (err error) {
		resp, err = locksOf(conn).Get(ctx, &pb.GetRequest{Name: name, Consistency: consistency(opts)})
		return err
	})
	return lockInfo(resp.GetLock()), err
}

// List shows the locks whose names begin with prefix, in order of name. Each
// page is consistent in itself.
func (c *Client) List(ctx context.Context, prefix string, opts ...ReadOption) iter.Seq2[LockInfo, error] {
	return func(yield func(LockInfo, error) bool) {
		pages(yield, func(token string) (list []LockInfo, next string, err error) {
			req := &pb.ListRequest{Prefix: prefix, PageSize: pageSize, PageToken: token, Consistency: consistency(opts)}
			err = c.call(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
				resp, err := locksOf(conn).List(ctx, req)
				list, next = each(resp.GetLocks(), lockInfo), resp.GetNextPageToken()
				return err
			})
			return list, next, err
		})
	}
}

const pageSize = 500

// CheckToken tells whether a token is of a live hold at this moment. A
// resource that can compare tokens should do that instead: the answer is old
// when it arrives.
func (c *Client) CheckToken(ctx context.Context, name string, token fence.Token) (TokenCheck, error) {
	answer, err := c.operate(ctx, &pb.Operation{Call: &pb.Operation_CheckToken{
		CheckToken: &pb.CheckTokenRequest{Name: name, Token: uint64(token)},
	}})
	return tokenCheck(answer.GetCheckToken()), err
}

func tokenCheck(r *pb.CheckTokenResponse) TokenCheck {
	return TokenCheck{
		Live: r.GetLive(), CurrentToken: fence.Token(r.GetCurrentToken()),
		LastToken: fence.Token(r.GetLastToken()), Floor: fence.Token(r.GetFloor()),
	}
}

// Watch yields what happens to the locks whose names begin with prefix, from
// revision from on (0: from now on), until ctx ends or the loop breaks. It
// resumes by itself over reconnects; ErrOutOfRange says that events were
// missed: list anew.
func (c *Client) Watch(ctx context.Context, prefix string, from uint64) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stopped := false
		err := c.retry(ctx, 0, func(ctx context.Context, conn *grpc.ClientConn) error {
			if from == 0 {
				// A position to resume from, should the stream break before
				// its first event.
				s, err := pb.NewClusterServiceClient(conn).Status(ctx, &pb.StatusRequest{})
				if err != nil {
					return err
				}
				from = s.GetRevision() + 1
			}
			stream, err := locksOf(conn).Watch(ctx, &pb.WatchRequest{Prefix: prefix, FromRevision: from})
			if err != nil {
				return err
			}
			for {
				resp, err := stream.Recv()
				if err != nil {
					return err
				}
				for _, e := range resp.GetEvents() {
					if !yield(event(e), nil) {
						stopped = true
						return nil
					}
				}
				from = resp.GetRevision() + 1
			}
		})
		if err != nil && !stopped {
			yield(Event{}, err)
		}
	}
}

func consistency(opts []ReadOption) pb.Consistency {
	var o readOptions
	for _, opt := range opts {
		opt.read(&o)
	}
	if o.stale {
		return pb.Consistency_CONSISTENCY_STALE
	}
	return pb.Consistency_CONSISTENCY_UNSPECIFIED
}

// pages yields what a list has, page by page.
func pages[T any](yield func(T, error) bool, page func(token string) (list []T, next string, err error)) {
	for token := ""; ; {
		list, next, err := page(token)
		if err != nil {
			var none T
			yield(none, err)
			return
		}
		for _, one := range list {
			if !yield(one, nil) {
				return
			}
		}
		if token = next; token == "" {
			return
		}
	}
}

func each[From, To any](list []From, convert func(From) To) []To {
	out := make([]To, len(list))
	for i, one := range list {
		out[i] = convert(one)
	}
	return out
}
