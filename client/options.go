package client

import "time"

// DefaultTTL is the TTL of a lock's own lease when none is given.
const DefaultTTL = 30 * time.Second

type acquireOptions struct {
	ttl       time.Duration
	wait      *time.Duration // nil: as long as ctx allows
	shared    bool
	limit     uint32
	lockDelay time.Duration
	metadata  map[string]string
	actor     string
	owner     string
	leaseID   uint64
	noRenew   bool
	// untilDeadline: wait is from the context's deadline.
	untilDeadline bool
	onRenew       func(time.Time)
}

func (c *Client) options() *acquireOptions { return &acquireOptions{ttl: DefaultTTL, owner: c.owner} }

// now makes them those of an acquisition that does not wait.
func (o *acquireOptions) now() *acquireOptions {
	o.wait = new(time.Duration)
	return o
}

type grantOptions struct {
	owner    string
	metadata map[string]string
}

// What may be given to which call. An option that has no meaning for a call does not
// compile for it.
type (
	// AcquireOption says how Client.Acquire and Client.AcquireAll take locks.
	AcquireOption interface{ acquire(*acquireOptions) }
	// TryAcquireOption says how Client.TryAcquire does.
	TryAcquireOption interface{ tryAcquire(*acquireOptions) }
	// LeaseAcquireOption says how Lease.Acquire and Lease.AcquireAll do.
	LeaseAcquireOption interface{ leaseAcquire(*acquireOptions) }
	// LeaseTryAcquireOption says how Lease.TryAcquire does.
	LeaseTryAcquireOption interface{ leaseTryAcquire(*acquireOptions) }
	// GrantOption says what a lease is that Client.Grant or Admin.Grant makes.
	GrantOption interface{ grant(*grantOptions) }
	// ReadOption says how Client.Get, Client.List, Admin.Lease and Admin.Leases read.
	ReadOption interface{ read(*readOptions) }
)

// HoldOption says what a hold is. It is for every way to take a lock.
type HoldOption func(*acquireOptions)

func (f HoldOption) acquire(o *acquireOptions)         { f(o) }
func (f HoldOption) tryAcquire(o *acquireOptions)      { f(o) }
func (f HoldOption) leaseAcquire(o *acquireOptions)    { f(o) }
func (f HoldOption) leaseTryAcquire(o *acquireOptions) { f(o) }

// Shared asks for a hold that others may share.
func Shared() HoldOption { return func(o *acquireOptions) { o.shared = true } }

// Limit asks for a shared hold of a lock that at most n hold at once: a
// semaphore. All who ask for the lock must name the same limit.
func Limit(n uint32) HoldOption {
	return func(o *acquireOptions) { o.shared, o.limit = true, n }
}

// LockDelay keeps the lock from being granted for d after this hold is lost
// (never after Release): time for its late writes to arrive, for resources
// that cannot check a token.
func LockDelay(d time.Duration) HoldOption { return func(o *acquireOptions) { o.lockDelay = d } }

// Actor names the thread of work that this acquisition belongs to. A request
// that would close a circle of actors waiting for each other is refused with
// ErrDeadlock.
func Actor(name string) HoldOption { return func(o *acquireOptions) { o.actor = name } }

// MetadataOption is for every way to take a lock, and for a lease.
type MetadataOption map[string]string

func (m MetadataOption) acquire(o *acquireOptions)         { o.metadata = m }
func (m MetadataOption) tryAcquire(o *acquireOptions)      { o.metadata = m }
func (m MetadataOption) leaseAcquire(o *acquireOptions)    { o.metadata = m }
func (m MetadataOption) leaseTryAcquire(o *acquireOptions) { o.metadata = m }
func (m MetadataOption) grant(o *grantOptions)             { o.metadata = m }

// Metadata is shown to whoever looks at the lock or waits behind it, or looks
// at the lease; at most 4 KiB.
func Metadata(m map[string]string) MetadataOption { return m }

// WaitOption bounds a wait, for calls that wait.
type WaitOption time.Duration

func (d WaitOption) acquire(o *acquireOptions)      { o.wait = (*time.Duration)(&d) }
func (d WaitOption) leaseAcquire(o *acquireOptions) { o.wait = (*time.Duration)(&d) }

// Wait bounds the time in the queue; ErrNotAcquired follows it.
func Wait(d time.Duration) WaitOption { return WaitOption(d) }

// LeaseOption says under which lease a lock is held, and how that lives. It is for
// locks that are not taken under a Lease.
type LeaseOption func(*acquireOptions)

func (f LeaseOption) acquire(o *acquireOptions)    { f(o) }
func (f LeaseOption) tryAcquire(o *acquireOptions) { f(o) }

// TTL sets the TTL of the lock's own lease; the default is DefaultTTL. The
// client renews it each time a third of it has passed. A shorter TTL frees the lock of a
// dead holder sooner, and loses it to a shorter pause or partition.
func TTL(d time.Duration) LeaseOption { return func(o *acquireOptions) { o.ttl = d } }

// UnderLeaseID holds the lock under a lease that somebody else keeps alive.
// Nothing renews it here: the client asks how long it still lives, three times
// a TTL, and believes in the lock for as long.
func UnderLeaseID(id uint64) LeaseOption { return func(o *acquireOptions) { o.leaseID = id } }

// NoRenew leaves the lock's lease alone: it ends its TTL after the grant
// unless somebody renews it.
func NoRenew() LeaseOption { return func(o *acquireOptions) { o.noRenew = true } }

// OnRenew is called after each successful renewal with the new deadline. It
// must not block.
func OnRenew(fn func(deadline time.Time)) LeaseOption {
	return func(o *acquireOptions) { o.onRenew = fn }
}

// OwnerOption is for whatever makes a lease.
type OwnerOption string

func (s OwnerOption) acquire(o *acquireOptions)    { o.owner = string(s) }
func (s OwnerOption) tryAcquire(o *acquireOptions) { o.owner = string(s) }
func (s OwnerOption) grant(o *grantOptions)        { o.owner = string(s) }

// Owner overrides the client's owner for the lease that is made.
func Owner(owner string) OwnerOption { return OwnerOption(owner) }

type readOptions struct{ stale bool }

// StaleOption is for reads.
type StaleOption struct{}

func (StaleOption) read(o *readOptions) { o.stale = true }

// Stale reads what the node that is asked has, leader or not, which may be
// behind: it costs the leader nothing and works without one. What is left of
// TTLs and lock-delays only the leader knows. Without it a read has every
// change that was acknowledged before it began.
func Stale() StaleOption { return StaleOption{} }
