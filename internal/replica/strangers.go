package replica

import (
	"container/list"
	"net"
)

// strangers bounds the connections to the peer port on which nobody has said yet
// who it is. Nobody waits for room: whoever is one too many takes that of the oldest
// from the address that has the most, so that those who never say who they are
// stand in each other's way, and in no member's, which says so at once. It belongs
// to the peers' mutex.
type strangers struct {
	max     int
	count   int
	sources map[string]*list.List // of *visit, oldest first, by host
}

// visit is a connection that has not said who it is.
type visit struct {
	conn   net.Conn
	source string
	at     *list.Element // nil once that is known, or it was turned away
}

func newStrangers(most int) *strangers {
	return &strangers{max: most, sources: make(map[string]*list.List)}
}

// enter lets a connection in, and returns the one that is to be closed for it;
// nil for none.
func (s *strangers) enter(conn net.Conn) (in, out *visit) {
	if s.count >= s.max {
		var most *list.List
		for _, l := range s.sources {
			if most == nil || l.Len() > most.Len() {
				most = l
			}
		}
		out = most.Front().Value.(*visit)
		s.leave(out)
	}
	in = &visit{conn: conn, source: hostOf(conn)}
	l := s.sources[in.source]
	if l == nil {
		l = list.New()
		s.sources[in.source] = l
	}
	in.at = l.PushBack(in)
	s.count++
	return in, out
}

// leave is called once it is known who it is, or the connection has ended.
func (s *strangers) leave(v *visit) {
	if v.at == nil {
		return
	}
	l := s.sources[v.source]
	l.Remove(v.at)
	if v.at = nil; l.Len() == 0 {
		delete(s.sources, v.source)
	}
	s.count--
}

func hostOf(conn net.Conn) string {
	host, _, err := net.SplitHostPort(conn.RemoteAddr().String())
	if err != nil {
		return conn.RemoteAddr().String()
	}
	return host
}
