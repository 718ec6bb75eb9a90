package replica

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/distlock/distlock/internal/bound"
	peerpb "github.com/distlock/distlock/proto/distlock/peer/v1"
)

// peers is the traffic between members: one port, on which each connection begins
// with a greeting that says who calls and what for. Whoever does not greet gets no
// answer.
type peers struct {
	r        *Replica
	listener net.Listener
	grpc     *grpc.Server
	raft     *bound.Handed // connections for raft
	peer     *bound.Handed // for PeerService
	forward  *bound.Handed // for forwarded calls of clients
	ctx      context.Context
	cancel   context.CancelFunc
	network  *raft.NetworkTransport
	reach    *transport // what raft sends by

	mu        sync.Mutex
	outward   map[outward]*grpc.ClientConn
	strangers *strangers
	open      map[net.Conn]struct{} // whose greeting is not over, and those to members, and raft's from them
	closed    bool
	group     sync.WaitGroup
	said      map[string]bool // see first
}

type outward struct {
	to   end
	kind byte
	lane int
}

// end is a member and the address where it is reached: the caller names the member
// that it wants, so that nobody else at that address answers for it.
type end struct {
	id      raft.ServerID
	address string
}

func endOf(s raft.Server) end { return end{s.ID, string(s.Address)} }

// What a connection is for.
const (
	kindRaft      = 'r'
	kindPeer      = 'p'
	kindForward   = 'f'
	kindProbe     = '?' // only to learn how the greeting is answered
	kindIntroduce = 'i' // to learn who is there, before anybody is a member
)

// The greeting: magic, kind, and a hello with its length before it. The answer
// is a byte and, unless it is answerWelcome, a reply with its length.
const (
	greetingMagic       = "distlock peer 1\n"
	maxHello            = 1 << 12
	greetWithin         = 3 * time.Second
	defaultMaxStrangers = 256
	answerWelcome       = 'w' // of the builds before incarnations
	answerMember        = 'W' // welcome, and who it is
	answerStranger      = 's' // of another cluster
	answerRemoved       = 'x'
	answerOther         = 'o' // not whom the caller looks for
	answerStale         = 'd' // the caller has been started again since
)

// hello says who calls whom. Members go by their ServerIDs. The builds before
// incarnations send the first two only, and read no more.
type hello struct {
	ClusterID string        `json:"clusterId"` // empty when not known yet
	NodeID    raft.ServerID `json:"nodeId"`
	To        raft.ServerID `json:"to,omitempty"`
	start
	// In an introduction: the members that a new cluster is to have, or the
	// address under which the caller runs.
	Members map[string]string `json:"members,omitempty"`
	Address string            `json:"address,omitempty"`
}

type reply struct {
	ClusterID string        `json:"clusterId"`
	NodeID    raft.ServerID `json:"nodeId"`
	Index     uint64        `json:"index"` // of a configuration without the caller
	start
	// Of an introduction.
	Members map[string]string `json:"members,omitempty"` // as a new cluster is to have them
	History bool              `json:"history,omitempty"` // it has one
	Known   raft.ServerID     `json:"known,omitempty"`   // who has the caller's name
	At      string            `json:"at,omitempty"`      // and where
	Leads   bool              `json:"leads,omitempty"`   // for certain
}

// strangerError says that the node at an address is of another cluster.
type strangerError struct {
	address string
	reply   reply
}

func (e *strangerError) Error() string {
	return fmt.Sprintf("node %s at %s is of cluster %s", nameOf(e.reply.NodeID), e.address, e.reply.ClusterID)
}

// removedError says that a member knows a configuration without this node.
type removedError struct{ index uint64 }

func (e *removedError) Error() string { return "this node is not a member" }

// otherError says that somebody else answers at a member's address.
type otherError struct{ want end }

func (e *otherError) Error() string {
	return fmt.Sprintf("what answers at %s is not member %s, or has another data directory", e.want.address, nameOf(e.want.id))
}

var errLegacy = errors.New("a build from before incarnations answers")

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
		raft: bound.NewHanded(l.Addr()), peer: bound.NewHanded(l.Addr()), forward: bound.NewHanded(l.Addr()),
		strangers: newStrangers(r.cfg.MaxStrangers), outward: make(map[outward]*grpc.ClientConn), open: make(map[net.Conn]struct{}),
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
		p.mu.Lock()
		in, out := p.strangers.enter(conn)
		p.mu.Unlock()
		if out != nil {
			out.conn.Close() // which ends its goroutine
			if p.first("many from " + out.source) {
				p.r.logger.Warn("closing connections to the peer port that do not say who they are", zap.String("from", out.source), zap.Int("moreThan", p.strangers.max))
			}
		}
		if !p.start(func() { p.greeted(in) }) {
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
func (p *peers) greeted(in *visit) {
	raw := in.conn
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		raw.Close()
		return
	}
	p.open[raw] = struct{}{}
	p.mu.Unlock()
	raw.SetDeadline(time.Now().Add(greetWithin))
	kind, conn, ok := p.hear(raw)
	p.mu.Lock()
	p.strangers.leave(in)
	delete(p.open, raw)
	p.mu.Unlock()
	to := map[byte]*bound.Handed{kindRaft: p.raft, kindPeer: p.peer, kindForward: p.forward}[kind]
	if !ok || to == nil {
		conn.Close()
		return
	}
	conn.SetDeadline(time.Time{})
	if kind == kindRaft { // which raft does not close
		var err error
		if conn, err = p.track(conn); err != nil {
			return
		}
	}
	to.Put(conn)
}

// track makes stop close a connection to a member. Otherwise what is on its way to a
// member that is silent would hold up this node's end for seconds.
func (p *peers) track(conn net.Conn) (net.Conn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		conn.Close()
		return nil, net.ErrClosed
	}
	t := &tracked{conn, p}
	p.open[t] = struct{}{}
	return t, nil
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
	kind := head[len(greetingMagic)]
	if kind == kindIntroduce {
		if a := p.introduced(h, conn); a != nil {
			writeMessage(conn, []byte{answerMember}, a)
		}
		return 0, conn, false
	}
	answer, a := p.judge(h, conn)
	var err error
	switch answer {
	case 0:
		return 0, conn, false
	case answerWelcome:
		_, err = conn.Write([]byte{answerWelcome})
	default:
		err = writeMessage(conn, []byte{answer}, a)
	}
	return kind, conn, err == nil && (answer == answerWelcome || answer == answerMember)
}

// judge decides how a greeting is answered; 0 means not at all.
func (p *peers) judge(h hello, conn net.Conn) (answer byte, a reply) {
	r := p.r
	ours := r.ClusterID()
	legacy := h.To == ""
	switch {
	case legacy && r.cfg.Store.Level() >= incarnationsLevel:
		return 0, a // members have said who they want for long
	case !legacy && h.To != r.self:
		if nameOf(h.To) == r.nodeID {
			if p.first("sought by " + string(h.NodeID)) {
				r.logger.Warn("refused a member that looks for this node with another data directory", zap.String("node", nameOf(h.NodeID)), zap.String("cluster", h.ClusterID))
			}
			p.mistaken(h, conn)
		}
		return answerOther, a
	case h.ClusterID != "" && ours != "" && h.ClusterID != ours:
		if p.first("of " + h.ClusterID + " " + string(h.NodeID)) {
			r.logger.Warn("refused a node of another cluster", zap.String("node", nameOf(h.NodeID)), zap.String("cluster", h.ClusterID))
		}
		return answerStranger, reply{ClusterID: ours, NodeID: r.self}
	}
	index, member := r.member(h.NodeID)
	switch {
	case !member:
		return answerRemoved, reply{ClusterID: ours, NodeID: r.self, Index: index}
	case !p.certified(h.NodeID, conn):
		if p.first("certificate of " + string(h.NodeID)) {
			r.logger.Warn("refused a node whose certificate does not name its peer address", zap.String("node", nameOf(h.NodeID)))
		}
		return 0, a
	case legacy:
		return answerWelcome, a
	}
	var stale *staleError
	switch err := r.starts.see(h.NodeID, h.start); {
	case errors.As(err, &stale):
		if p.first(err.Error()) {
			r.logger.Warn("refused an old start, or a copy, of a member", zap.Error(err))
		}
		return answerStale, reply{NodeID: r.self, start: start{Start: stale.last}}
	case err != nil:
		r.logger.Warn("cannot write down a member's start", zap.Error(err))
		return 0, a
	}
	return answerMember, reply{ClusterID: ours, NodeID: r.self, start: r.start}
}

// first reports whether something is to be said for the first time: members try
// again many times a second.
func (p *peers) first(what string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.said[what] || len(p.said) > 1000 {
		return false
	}
	if p.said == nil {
		p.said = make(map[string]bool)
	}
	p.said[what] = true
	return true
}

// mistaken is called when a member of another cluster looks for this node. If this node
// has just begun a history alone, or waits to begin one, it is a member of that
// cluster that has lost its directory, and it stops: it would grant locks that the
// cluster has granted to others. A history that was there before this start, or that
// an operator made with a word like recover, is kept.
func (p *peers) mistaken(h hello, conn net.Conn) {
	r := p.r
	servers := len(r.configuration().servers.Servers)
	begins := r.beganAlone && servers == 1 || servers == 0 && !r.cfg.Join
	if begins && h.ClusterID != "" && h.ClusterID != r.ClusterID() && p.certified(h.NodeID, conn) {
		r.fail(excluded{&ReplacedError{NodeID: r.nodeID, Other: nameOf(h.NodeID), ClusterID: h.ClusterID}})
	}
}

// certified tells whether a member's certificate names the host of its peer
// address. Without TLS there is none, and whoever is not known yet has none.
func (p *peers) certified(id raft.ServerID, conn net.Conn) bool {
	secure, ok := conn.(*tls.Conn)
	if !ok {
		return true
	}
	address := p.r.cfg.InitialCluster[nameOf(id)]
	if s, ok := p.r.server(id); ok {
		address = string(s.Address)
	}
	if address == "" {
		return true
	}
	host, _, err := net.SplitHostPort(address)
	certs := secure.ConnectionState().PeerCertificates
	return err == nil && len(certs) > 0 && certs[0].VerifyHostname(host) == nil
}

// member tells whether a node is in the configuration, latest or committed;
// and if not, the index of the committed one. A node that knows no
// configuration yet takes everybody for a member.
func (r *Replica) member(id raft.ServerID) (uint64, bool) {
	latest := r.configuration()
	r.mu.Lock()
	committed := r.committed
	r.mu.Unlock()
	return isMember(id, latest, committed, r.raft.CommitIndex())
}

func isMember(id raft.ServerID, latest, committed configuration, commitIndex uint64) (uint64, bool) {
	if committed.index < latest.index && latest.index <= commitIndex {
		committed = latest
	}
	if len(latest.servers.Servers) == 0 || committed.index == 0 {
		return 0, true
	}
	for _, c := range []configuration{latest, committed} {
		for _, s := range c.servers.Servers {
			if s.ID == id {
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

// dial connects to a member. Errors: *strangerError, *removedError,
// *otherError, *CopyError (and this node stops), errLegacy, the network's.
func (p *peers) dial(ctx context.Context, to end, kind byte) (_ net.Conn, err error) {
	conn, answer, a, err := p.greet(ctx, to.address, kind, hello{ClusterID: p.r.ClusterID(), NodeID: p.r.self, To: to.id, start: p.r.start})
	if err != nil {
		return nil, err
	}
	switch {
	case answer == answerWelcome:
		if p.r.cfg.Store.Level() >= incarnationsLevel {
			err = errLegacy
		}
	case answer == answerStranger:
		err = &strangerError{to.address, a}
	case a.NodeID != to.id: // what it says of this node is not a member's word
		err = &otherError{to}
	case answer == answerMember:
		err = p.r.starts.see(to.id, a.start)
	case answer == answerRemoved:
		err = &removedError{a.Index}
	case answer == answerStale:
		err = &CopyError{NodeID: p.r.nodeID, This: p.r.start.Start, Last: a.Start}
		p.r.fail(excluded{err})
	default:
		err = fmt.Errorf("%s answers what this build does not know", to.address)
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// greet connects to an address, says hello, and returns the answer.
func (p *peers) greet(ctx context.Context, address string, kind byte, h hello) (_ net.Conn, answer byte, a reply, err error) {
	connect := p.r.cfg.dial
	if connect == nil {
		connect = func(ctx context.Context, address string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", address)
		}
	}
	conn, err := connect(ctx, address)
	if err != nil {
		return nil, 0, a, err
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
			return nil, 0, a, err
		}
		conn = tls.Client(conn, cfg)
	}
	if err := writeMessage(conn, append([]byte(greetingMagic), kind), h); err != nil {
		return nil, 0, a, err
	}
	var first [1]byte
	if _, err := io.ReadFull(conn, first[:]); err != nil {
		return nil, 0, a, fmt.Errorf("%s did not answer as a member does: %w", address, err)
	}
	if first[0] != answerWelcome {
		if err := readMessage(conn, &a); err != nil {
			return nil, 0, a, err
		}
	}
	return conn, first[0], a, nil
}

// conn returns the connection of a lane to a member, made on first use.
func (p *peers) conn(to end, kind byte, lane int) (*grpc.ClientConn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, net.ErrClosed
	}
	key := outward{to, kind, lane}
	if c := p.outward[key]; c != nil {
		return c, nil
	}
	c, err := grpc.NewClient("passthrough:///"+to.address,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // TLS, if any, is in dial
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			conn, err := p.dial(ctx, to, kind)
			if err != nil {
				return nil, err
			}
			return p.track(conn)
		}),
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

// probe learns how a member answers; nil is a welcome.
func (p *peers) probe(to end, within time.Duration) error {
	ctx, cancel := context.WithTimeout(p.ctx, within)
	defer cancel()
	conn, err := p.dial(ctx, to, kindProbe)
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
	outward := slices.Collect(maps.Values(p.outward))
	p.mu.Unlock()
	for _, c := range outward { // their connections go through Close of tracked
		c.Close()
	}
}

func (p *peers) close() {
	p.stop()
	for _, c := range []*bound.Handed{p.raft, p.peer, p.forward} {
		c.Close()
	}
	if p.network != nil {
		p.network.Close()
	}
	p.grpc.Stop()
	p.group.Wait()
}

// streams implements raft.StreamLayer.
type streams struct{ p *peers }

func (s streams) Accept() (net.Conn, error) { return s.p.raft.Accept() }
func (s streams) Close() error              { return s.p.raft.Close() }
func (s streams) Addr() net.Addr            { return address(s.p.r.cfg.PeerAddress) }

// Dial implements raft.StreamLayer.
func (s streams) Dial(target raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(s.p.ctx, timeout)
	defer cancel()
	conn, err := s.p.dial(ctx, untarget(target), kindRaft)
	var removed *removedError
	if errors.As(err, &removed) {
		select {
		case s.p.r.suspects <- struct{}{}:
		default:
		}
	}
	if err != nil {
		return nil, err
	}
	return s.p.track(conn)
}

// target is the address that we give to raft's transport: it has the member's id in it,
// which raft does not tell its StreamLayer. So its pools of connections are by id as
// well.
func target(id raft.ServerID, address raft.ServerAddress) raft.ServerAddress {
	return raft.ServerAddress(string(id) + "\n" + string(address))
}

func untarget(t raft.ServerAddress) end {
	id, address, _ := strings.Cut(string(t), "\n")
	return end{raft.ServerID(id), address}
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
func (t *transport) AppendEntries(id raft.ServerID, address raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if t.r.stalled.Load() {
		return errStalled
	}
	if !heartbeat(args) {
		if err := t.await(id, args.Term); err != nil {
			return err
		}
	}
	shorten(args)
	err := t.NetworkTransport.AppendEntries(id, target(id, address), args, resp)
	t.heard(id, err)
	return err
}

// appendBytes bounds the entries of one message, whatever their number: over a
// slow link it would take longer than raft waits for its answer, every time.
const appendBytes = 256 << 10

// shorten leaves out of a message the entries beyond appendBytes. Raft sends the next
// message from the last entry that was in it.
func shorten(args *raft.AppendEntriesRequest) {
	bytes := 0
	for i, l := range args.Entries {
		if bytes += len(l.Data); bytes > appendBytes && i > 0 {
			args.Entries = args.Entries[:i]
			return
		}
	}
}

// heartbeat tells raft's heartbeats from messages that replicate: those say where in
// the log their entries belong.
func heartbeat(args *raft.AppendEntriesRequest) bool {
	return len(args.Entries) == 0 && args.PrevLogEntry == 0 && args.LeaderCommitIndex == 0
}

// InstallSnapshot implements raft.Transport.
func (t *transport) InstallSnapshot(id raft.ServerID, address raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	if err := t.await(id, args.Term); err != nil {
		return err
	}
	err := t.NetworkTransport.InstallSnapshot(id, target(id, address), args, resp, data)
	t.heard(id, err)
	return err
}

// TimeoutNow implements raft.Transport. Raft takes no changes until it is
// answered, and waits for as long as it takes.
func (t *transport) TimeoutNow(id raft.ServerID, address raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	answered := make(chan error, 1)
	own := new(raft.TimeoutNowResponse) // resp is raft's once this returns
	if !t.r.peers.start(func() { answered <- t.NetworkTransport.TimeoutNow(id, target(id, address), args, own) }) {
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

// RequestVote implements raft.Transport.
func (t *transport) RequestVote(id raft.ServerID, address raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	return t.NetworkTransport.RequestVote(id, target(id, address), args, resp)
}

// RequestPreVote implements raft.WithPreVote.
func (t *transport) RequestPreVote(id raft.ServerID, address raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	return t.NetworkTransport.RequestPreVote(id, target(id, address), args, resp)
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
			_, member := t.r.server(id)
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
		t.r.logger.Warn("a member does not answer", zap.String("node", nameOf(id)), zap.Error(err))
	case err == nil && was:
		t.r.logger.Info("a member answers again", zap.String("node", nameOf(id)))
	}
}

// AppendEntriesPipeline implements raft.Transport.
func (t *transport) AppendEntriesPipeline(id raft.ServerID, address raft.ServerAddress) (raft.AppendPipeline, error) {
	p, err := t.NetworkTransport.AppendEntriesPipeline(id, target(id, address))
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
	shorten(args)
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
		NodeId: string(r.self), ClientAddress: r.cfg.ClientAddress, Version: r.cfg.Version, AppliedIndex: r.raft.AppliedIndex(),
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
