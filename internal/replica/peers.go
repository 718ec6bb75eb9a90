package replica

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	peerpb "github.com/distlock/distlock/proto/distlock/peer/v1"
)

// peers is the traffic between members: one port, on which each connection
// says first whose it is and what for. Whoever does not speak so is answered
// with nothing.
type peers struct {
	r        *Replica
	listener net.Listener
	grpc     *grpc.Server
	raft     *conns // connections for raft
	peer     *conns // for PeerService
	forward  *conns // for forwarded calls of clients
	ctx      context.Context
	cancel   context.CancelFunc
	network  *raft.NetworkTransport
	reach    *transport // what raft sends by

	mu      sync.Mutex
	outward map[outward]*grpc.ClientConn
	open    map[net.Conn]struct{} // whose greeting is not over, and raft's, which raft does not close
	closed  bool
	group   sync.WaitGroup
}

type outward struct {
	address string
	kind    byte
}

// What a connection is for.
const (
	kindRaft    = 'r'
	kindPeer    = 'p'
	kindForward = 'f'
	kindProbe   = '?' // only to learn how the greeting is answered
)

// The greeting: magic, kind, and a hello with its length before it. The answer
// is a byte and, unless it is answerWelcome, a reply with its length.
const (
	greetingMagic  = "distlock peer 1\n"
	maxHello       = 1 << 10
	greetWithin    = 3 * time.Second
	answerWelcome  = 'w'
	answerStranger = 's' // of another cluster
	answerRemoved  = 'x'
)

type hello struct {
	ClusterID string `json:"clusterId"` // empty when not known yet
	NodeID    string `json:"nodeId"`
}

type reply struct {
	ClusterID string `json:"clusterId"`
	NodeID    string `json:"nodeId"`
	Index     uint64 `json:"index"` // of the configuration that has the caller not
}

// strangerError says that the node at an address is of another cluster.
type strangerError struct {
	address string
	reply   reply
}

func (e *strangerError) Error() string {
	return fmt.Sprintf("node %s at %s is of cluster %s", e.reply.NodeID, e.address, e.reply.ClusterID)
}

// removedError says that a member knows a configuration without this node.
type removedError struct{ index uint64 }

func (e *removedError) Error() string { return "this node is not a member" }

func listenPeers(r *Replica) (*peers, error) {
	l, err := net.Listen("tcp", r.cfg.PeerListen)
	if err != nil {
		if errors.Is(err, syscall.EADDRINUSE) {
			err = errors.New("it is in use: another server listens there")
		}
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err
		}
		return nil, fmt.Errorf("cannot listen for peers on %s: %w", r.cfg.PeerListen, err)
	}
	p := &peers{
		r: r, listener: l, grpc: grpc.NewServer(),
		raft: newConns(l.Addr()), peer: newConns(l.Addr()), forward: newConns(l.Addr()),
		outward: make(map[outward]*grpc.ClientConn), open: make(map[net.Conn]struct{}),
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	peerpb.RegisterPeerServiceServer(p.grpc, &peerService{r: r})
	return p, nil
}

// peerTimeout bounds raft's calls, but for snapshots, which get more by size.
const peerTimeout = 3 * time.Second

// raftTransport is what raft sends by. It is silent while the disk stalls.
func (p *peers) raftTransport() raft.Transport {
	p.network = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: streams{p}, MaxPool: 3, Timeout: peerTimeout, Logger: quiet(p.r.logger.Named("peer"), nil),
		MsgpackUseNewTimeFormat: true,
	})
	p.reach = &transport{NetworkTransport: p.network, r: p.r, silence: make(map[raft.ServerID]chan struct{})}
	return p.reach
}

// silent reports whether a follower did not answer when it was sent something
// the last time.
func (p *peers) silent(id raft.ServerID) bool { return p.reach.silentUntil(id) != nil }

// serve begins to take connections; raft must be running.
func (p *peers) serve() {
	p.group.Add(2)
	go func() {
		defer p.group.Done()
		p.grpc.Serve(p.peer)
	}()
	go p.accept()
}

func (p *peers) accept() {
	defer p.group.Done()
	slots := make(chan struct{}, 256) // greetings under way
	for {
		conn, err := p.listener.Accept()
		if err != nil {
			if p.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			select {
			case <-p.ctx.Done():
				return
			case <-time.After(50 * time.Millisecond): // out of descriptors, most likely
			}
			continue
		}
		select {
		case slots <- struct{}{}:
		case <-p.ctx.Done():
			conn.Close()
			return
		}
		if !p.start(func() { p.greeted(conn); <-slots }) {
			conn.Close()
		}
	}
}

// start runs fn on a goroutine that close waits for; false once closed.
func (p *peers) start(fn func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.group.Add(1)
	go func() {
		defer p.group.Done()
		fn()
	}()
	return true
}

// greeted hears who connects, and hands the connection to whom it is for.
func (p *peers) greeted(conn net.Conn) {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		conn.Close()
		return
	}
	p.open[conn] = struct{}{}
	p.mu.Unlock()
	conn.SetDeadline(time.Now().Add(greetWithin))
	raw := conn
	kind, conn, ok := p.hear(conn)
	p.mu.Lock()
	delete(p.open, raw)
	if ok && kind == kindRaft {
		conn = &tracked{conn, p}
		if p.open[conn] = struct{}{}; p.closed {
			ok = false
		}
	}
	p.mu.Unlock()
	to := map[byte]*conns{kindRaft: p.raft, kindPeer: p.peer, kindForward: p.forward}[kind]
	if !ok || to == nil {
		conn.Close()
		return
	}
	conn.SetDeadline(time.Time{})
	to.put(conn)
}

// tracked is a connection that stop closes.
type tracked struct {
	net.Conn
	p *peers
}

// Close implements net.Conn.
func (t *tracked) Close() error {
	t.p.mu.Lock()
	delete(t.p.open, t)
	t.p.mu.Unlock()
	return t.Conn.Close()
}

func (p *peers) hear(conn net.Conn) (byte, net.Conn, bool) {
	if p.r.cfg.PeerTLS != nil {
		cfg := p.r.cfg.PeerTLS.Clone()
		cfg.ClientAuth, cfg.ClientCAs = tls.RequireAndVerifyClientCert, cfg.RootCAs
		conn = tls.Server(conn, cfg)
	}
	head := make([]byte, len(greetingMagic)+1)
	if _, err := io.ReadFull(conn, head); err != nil || string(head[:len(greetingMagic)]) != greetingMagic {
		return 0, conn, false
	}
	var h hello
	if err := readMessage(conn, &h); err != nil {
		return 0, conn, false
	}
	ours := p.r.ClusterID()
	if h.ClusterID != "" && ours != "" && h.ClusterID != ours {
		p.r.logger.Warn("refused a node of another cluster", zap.String("node", h.NodeID), zap.String("cluster", h.ClusterID))
		writeMessage(conn, []byte{answerStranger}, reply{ClusterID: ours, NodeID: p.r.nodeID})
		return 0, conn, false
	}
	if index, member := p.r.member(h.NodeID); !member {
		writeMessage(conn, []byte{answerRemoved}, reply{ClusterID: ours, NodeID: p.r.nodeID, Index: index})
		return 0, conn, false
	}
	_, err := conn.Write([]byte{answerWelcome})
	return head[len(greetingMagic)], conn, err == nil
}

// member tells whether a node is in the configuration, latest or committed;
// and if not, the index of the committed one. A node that knows no
// configuration yet takes everybody for a member.
func (r *Replica) member(id string) (uint64, bool) {
	latest := r.configuration()
	r.mu.Lock()
	committed := r.committed
	r.mu.Unlock()
	return isMember(id, latest, committed, r.raft.CommitIndex())
}

func isMember(id string, latest, committed configuration, commitIndex uint64) (uint64, bool) {
	if committed.index < latest.index && latest.index <= commitIndex {
		committed = latest
	}
	if len(latest.servers.Servers) == 0 || committed.index == 0 {
		return 0, true
	}
	for _, c := range []configuration{latest, committed} {
		for _, s := range c.servers.Servers {
			if string(s.ID) == id {
				return 0, true
			}
		}
	}
	return committed.index, false
}

func readMessage(from io.Reader, to any) error {
	var size [2]byte
	if _, err := io.ReadFull(from, size[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint16(size[:])
	if n > maxHello {
		return errors.New("too long")
	}
	text := make([]byte, n)
	if _, err := io.ReadFull(from, text); err != nil {
		return err
	}
	return json.Unmarshal(text, to)
}

func writeMessage(to io.Writer, before []byte, message any) error {
	text, err := json.Marshal(message)
	if err != nil {
		return err
	}
	_, err = to.Write(append(binary.BigEndian.AppendUint16(before, uint16(len(text))), text...))
	return err
}

// dial connects to the node at an address. Errors: *strangerError,
// *removedError, the network's.
func (p *peers) dial(ctx context.Context, address string, kind byte) (_ net.Conn, err error) {
	connect := p.r.cfg.dial
	if connect == nil {
		connect = func(ctx context.Context, address string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", address)
		}
	}
	conn, err := connect(ctx, address)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	deadline := time.Now().Add(greetWithin)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	conn.SetDeadline(deadline)
	if p.r.cfg.PeerTLS != nil {
		cfg := p.r.cfg.PeerTLS.Clone()
		if cfg.ServerName, _, err = net.SplitHostPort(address); err != nil {
			return nil, err
		}
		conn = tls.Client(conn, cfg)
	}
	if err := writeMessage(conn, append([]byte(greetingMagic), kind), hello{p.r.ClusterID(), p.r.nodeID}); err != nil {
		return nil, err
	}
	var answer [1]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return nil, fmt.Errorf("%s did not answer as a member does: %w", address, err)
	}
	if answer[0] == answerWelcome {
		return conn, conn.SetDeadline(time.Time{})
	}
	var a reply
	if err := readMessage(conn, &a); err != nil {
		return nil, err
	}
	if answer[0] == answerRemoved {
		return nil, &removedError{a.Index}
	}
	return nil, &strangerError{address, a}
}

// conn returns the connection to a member, made on first use.
func (p *peers) conn(address string, kind byte) (*grpc.ClientConn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, net.ErrClosed
	}
	key := outward{address, kind}
	if c := p.outward[key]; c != nil {
		return c, nil
	}
	c, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // TLS, if any, is in dial
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return p.dial(ctx, address, kind) }),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 250 * time.Millisecond},
			MinConnectTimeout: time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 2 * time.Second}),
		grpc.WithDisableServiceConfig(),
	)
	if err != nil {
		return nil, err
	}
	p.outward[key] = c
	return c, nil
}

// probe learns how the node at an address answers; nil is a welcome.
func (p *peers) probe(address string, within time.Duration) error {
	ctx, cancel := context.WithTimeout(p.ctx, within)
	defer cancel()
	conn, err := p.dial(ctx, address, kindProbe)
	if err == nil {
		conn.Close()
	}
	return err
}

// stop ends what would keep raft from ending.
func (p *peers) stop() {
	p.cancel()
	p.listener.Close()
	p.mu.Lock()
	p.closed = true
	for conn := range p.open {
		if t, ok := conn.(*tracked); ok {
			conn = t.Conn
		}
		conn.Close()
	}
	for _, c := range p.outward {
		c.Close()
	}
	p.mu.Unlock()
}

func (p *peers) close() {
	p.stop()
	for _, c := range []*conns{p.raft, p.peer, p.forward} {
		c.Close()
	}
	if p.network != nil {
		p.network.Close()
	}
	p.grpc.Stop()
	p.group.Wait()
}

// conns is a listener of the connections that are put into it.
type conns struct {
	addr   net.Addr
	ch     chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newConns(addr net.Addr) *conns {
	return &conns{addr: addr, ch: make(chan net.Conn), closed: make(chan struct{})}
}

func (c *conns) put(conn net.Conn) {
	select {
	case c.ch <- conn:
	case <-c.closed:
		conn.Close()
	}
}

// Accept implements net.Listener.
func (c *conns) Accept() (net.Conn, error) {
	select {
	case conn := <-c.ch:
		return conn, nil
	case <-c.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (c *conns) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

// Addr implements net.Listener.
func (c *conns) Addr() net.Addr { return c.addr }

// streams implements raft.StreamLayer.
type streams struct{ p *peers }

func (s streams) Accept() (net.Conn, error) { return s.p.raft.Accept() }
func (s streams) Close() error              { return s.p.raft.Close() }
func (s streams) Addr() net.Addr            { return address(s.p.r.cfg.PeerAddress) }

// Dial implements raft.StreamLayer.
func (s streams) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(s.p.ctx, timeout)
	defer cancel()
	conn, err := s.p.dial(ctx, string(address), kindRaft)
	var removed *removedError
	if errors.As(err, &removed) {
		select {
		case s.p.r.suspects <- struct{}{}:
		default:
		}
	}
	return conn, err
}

// address is a net.Addr as it is written.
type address string

func (a address) Network() string { return "tcp" }
func (a address) String() string  { return string(a) }

// transport is raft's, silent towards the followers while the disk stalls.
//
// What raft sends to a follower that does not answer waits here until a
// heartbeat has come through: raft itself would wait for 10 ms, then twice as
// long each time, up to 10 s, and leave one that is back alone for that long.
// No answer is made up.
type transport struct {
	*raft.NetworkTransport
	r *Replica

	mu      sync.Mutex
	silence map[raft.ServerID]chan struct{} // of followers that did not answer the last time; closed when they do
}

var (
	errStalled   = errors.New("the disk stalls")
	errNotWanted = errors.New("it is no longer to be sent")
)

// AppendEntries implements raft.Transport.
func (t *transport) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if t.r.stalled.Load() {
		return errStalled
	}
	if !heartbeat(args) {
		if err := t.await(id, args.Term); err != nil {
			return err
		}
	}
	err := t.NetworkTransport.AppendEntries(id, target, args, resp)
	t.heard(id, err)
	return err
}

// heartbeat tells raft's heartbeats from what it replicates, which says where
// in the log it belongs.
func heartbeat(args *raft.AppendEntriesRequest) bool {
	return len(args.Entries) == 0 && args.PrevLogEntry == 0 && args.LeaderCommitIndex == 0
}

// InstallSnapshot implements raft.Transport.
func (t *transport) InstallSnapshot(id raft.ServerID, target raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	if err := t.await(id, args.Term); err != nil {
		return err
	}
	err := t.NetworkTransport.InstallSnapshot(id, target, args, resp, data)
	t.heard(id, err)
	return err
}

// TimeoutNow implements raft.Transport. Raft takes no changes until it is
// answered, and waits for as long as it takes.
func (t *transport) TimeoutNow(id raft.ServerID, target raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	answered := make(chan error, 1)
	own := new(raft.TimeoutNowResponse) // resp is raft's once this returns
	if !t.r.peers.start(func() { answered <- t.NetworkTransport.TimeoutNow(id, target, args, own) }) {
		return net.ErrClosed
	}
	select {
	case err := <-answered:
		*resp = *own
		return err
	case <-time.After(t.r.cfg.ElectionTimeout):
		return fmt.Errorf("%s does not answer", id)
	}
}

func (t *transport) silentUntil(id raft.ServerID) <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c, ok := t.silence[id]; ok {
		return c
	}
	return nil
}

// await waits while a follower is silent. It fails once the leadership of the
// term has ended, the follower is no member any more, or this node stops.
func (t *transport) await(id raft.ServerID, term uint64) error {
	for {
		answers := t.silentUntil(id)
		if answers == nil {
			return nil
		}
		select {
		case <-answers:
		case <-t.r.peers.ctx.Done():
			return net.ErrClosed
		case <-time.After(50 * time.Millisecond):
			select {
			case <-t.r.started:
			default:
				continue
			}
			_, member := t.r.server(string(id))
			if !member || t.r.raft.State() != raft.Leader || t.r.raft.CurrentTerm() != term {
				return errNotWanted
			}
		}
	}
}

// heard says, once each time, that a follower does not answer, or does again.
func (t *transport) heard(id raft.ServerID, err error) {
	if t.r.peers.ctx.Err() != nil {
		return
	}
	t.mu.Lock()
	answers, was := t.silence[id]
	switch {
	case err != nil && !was:
		t.silence[id] = make(chan struct{})
	case err == nil && was:
		delete(t.silence, id)
		close(answers)
	}
	t.mu.Unlock()
	switch {
	case err != nil && !was:
		t.r.logger.Warn("a member does not answer", zap.String("node", string(id)), zap.Error(err))
	case err == nil && was:
		t.r.logger.Info("a member answers again", zap.String("node", string(id)))
	}
}

// AppendEntriesPipeline implements raft.Transport.
func (t *transport) AppendEntriesPipeline(id raft.ServerID, target raft.ServerAddress) (raft.AppendPipeline, error) {
	p, err := t.NetworkTransport.AppendEntriesPipeline(id, target)
	if err != nil {
		return nil, err
	}
	return &pipeline{p, t.r}, nil
}

type pipeline struct {
	raft.AppendPipeline
	r *Replica
}

// AppendEntries implements raft.AppendPipeline.
func (p *pipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	if p.r.stalled.Load() {
		return nil, errStalled
	}
	return p.AppendPipeline.AppendEntries(args, resp)
}

// peerService answers the other members.
type peerService struct {
	peerpb.UnimplementedPeerServiceServer
	r *Replica
}

// Term implements the service. Raft shows a term only once it is persisted.
func (s *peerService) Term(context.Context, *peerpb.TermRequest) (*peerpb.TermResponse, error) {
	return &peerpb.TermResponse{Term: s.r.raft.CurrentTerm()}, nil
}

// About implements the service.
func (s *peerService) About(context.Context, *peerpb.AboutRequest) (*peerpb.AboutResponse, error) {
	r := s.r
	return &peerpb.AboutResponse{
		NodeId: r.nodeID, ClientAddress: r.cfg.ClientAddress, Version: r.cfg.Version, AppliedIndex: r.raft.AppliedIndex(),
		LastIndex: r.raft.LastIndex(), Term: r.raft.CurrentTerm(), Leader: r.known().serving, Level: uint32(r.newest),
	}, nil
}

// Forwarded is where forwarded calls arrive, to be served like those of
// clients; nil without a peer port.
func (r *Replica) Forwarded() net.Listener {
	if r.peers == nil {
		return nil
	}
	return r.peers.forward
}
