package client

import "time"

// WithTimeline replaces the clock that counts a machine's sleep.
func WithTimeline(now, lately func() time.Duration) Option {
	return func(c *Client) { c.now, c.lately = now, lately }
}

var Boottime = boottime
