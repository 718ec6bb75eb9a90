package believe

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/distlock/distlock/client"
)

// Order is what crowds are told to do.
type Order string

// The orders, by the names of Crowd's methods.
const (
	Rest Order = "rest"
	Give Order = "give"
	Work Order = "work"
)

// Party is all who use a server.
type Party interface {
	Tell(Order) error
	Reports() ([]Report, error)
}

// Crowds are a Party in this process.
type Crowds []*Crowd

// Tell implements Party.
func (list Crowds) Tell(o Order) error {
	for _, c := range list {
		switch o {
		case Rest:
			c.Rest()
		case Give:
			c.Give()
		case Work:
			c.Work()
		}
	}
	return nil
}

// Reports implements Party.
func (list Crowds) Reports() (reports []Report, err error) {
	for _, c := range list {
		reports = append(reports, c.Report())
	}
	return reports, nil
}

// Twice reads the server while everybody works, and fails when a lock was
// believed all the while that is not held there.
func Twice(ctx context.Context, look *client.Client, party Party) error {
	d, _, err := once(ctx, look, party, false)
	if err == nil && len(d.Twice) > 0 {
		return errors.New(Difference{Twice: d.Twice}.String())
	}
	return nil
}

func once(ctx context.Context, look *client.Client, party Party, quiet bool) (d Difference, state State, err error) {
	before, err := party.Reports()
	if err != nil {
		return d, state, err
	}
	if state, err = Read(ctx, look); err != nil {
		return d, state, err
	}
	after, err := party.Reports()
	if err != nil {
		return d, state, err
	}
	for _, r := range after {
		for _, f := range r.Faults {
			return d, state, errors.New(f)
		}
	}
	return Compare(before, state, after, quiet), state, nil
}

// Round is a quiet moment, once faults have ended: everybody rests until the
// server has exactly what they believe, then gives everything back until it has
// nothing. Each may take until patience is over: the longest TTL, that of a
// dead one, and what an operation may take. Then there is work again.
func Round(ctx context.Context, look *client.Client, party Party, patience time.Duration) (ops int, err error) {
	steps := []struct {
		order Order
		done  func(d Difference, s State, busy, holds int) bool
	}{
		{Rest, func(d Difference, _ State, busy, _ int) bool { return d.None() && busy == 0 }},
		{Give, func(d Difference, s State, busy, holds int) bool {
			return d.None() && busy+holds+len(s.Holds)+len(s.Waits) == 0
		}},
	}
	for _, step := range steps {
		if err := party.Tell(step.order); err != nil {
			return 0, err
		}
		began := time.Now()
		for {
			quiet := time.Since(began) > patience/2
			d, s, err := once(ctx, look, party, quiet)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", step.order, err)
			}
			if len(d.Twice) > 0 {
				return 0, fmt.Errorf("%s: %v", step.order, d)
			}
			reports, err := party.Reports()
			if err != nil {
				return 0, err
			}
			busy, holds := 0, 0
			ops = 0
			for _, r := range reports {
				busy, holds, ops = busy+r.Busy, holds+len(r.Holds), ops+r.Ops
			}
			if step.done(d, s, busy, holds) {
				break
			}
			if time.Since(began) > patience {
				return ops, fmt.Errorf("%s: after %v: %d busy, %d believed, %d held, %d queues; %v", step.order, patience, busy, holds, len(s.Holds), len(s.Waits), d)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return ops, party.Tell(Work)
}
