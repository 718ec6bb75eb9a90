package client

import "time"

// WithTimeline replaces the clock that counts a machine's sleep.
func WithTimeline(now, lately func() time.Duration) Option {
	return func(c *Client) { c.now, c.lately = now, lately }
}

var Boottime = boottime

// Unsettled counts what the server has still to be told of.
func Unsettled(c *Client) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.unsettled)
}
