// Package carry is what passes over HTTP and over gRPC have in common: which pass a
// lock shows, and how it is read from three texts.
package carry

import (
	"fmt"
	"net/url"
	"strconv"

	"github.com/distlock/distlock/fence"
)

// Shown is the pass that a lock shows for the resource that its name guards. Errors:
// the lock's own once it is lost; that it is not on that name.
func Shown(lock fence.Holder, name string) (fence.Pass, error) {
	pass, ok := lock.PassFor(name) // before Err: a pass of a lock that is lost since is not shown
	if err := lock.Err(); err != nil {
		return fence.Pass{}, err
	}
	if !ok {
		return fence.Pass{}, fmt.Errorf("the lock is not on %q", name)
	}
	return pass, nil
}

// Texts are a pass and its resource, as they travel.
func Texts(resource string, pass fence.Pass) [3]string {
	return [3]string{url.PathEscape(resource), pass.Token.String(), pass.Floor.String()}
}

// MissingError says which of the three is not there.
type MissingError struct{ Key string }

func (e *MissingError) Error() string { return "there is no " + e.Key }

// InvalidError says what is wrong with one of the three. It is fence.ErrInvalidPass.
type InvalidError struct{ Key, Msg string }

func (e *InvalidError) Error() string { return e.Key + " " + e.Msg }

// Unwrap returns fence.ErrInvalidPass.
func (e *InvalidError) Unwrap() error { return fence.ErrInvalidPass }

// Read is the resource and the pass in what values has under three keys. Errors:
// *MissingError, *InvalidError, and those of fence.Next for no pass of any grant.
func Read(keys [3]string, values func(key string) []string) (resource string, pass fence.Pass, err error) {
	var texts [3]string
	for i, key := range keys {
		switch all := values(key); len(all) {
		case 0:
			return "", fence.Pass{}, &MissingError{key}
		case 1:
			texts[i] = all[0]
		default:
			return "", fence.Pass{}, &InvalidError{key, "is there more than once"}
		}
	}
	resource, err = url.PathUnescape(texts[0])
	if err != nil {
		return "", fence.Pass{}, &InvalidError{keys[0], "is not percent-encoded"}
	}
	var numbers [2]uint64
	for i, text := range texts[1:] {
		if numbers[i], err = strconv.ParseUint(text, 10, 64); err != nil {
			return "", fence.Pass{}, &InvalidError{keys[i+1], "is not a number"}
		}
	}
	pass = fence.Pass{Token: fence.Token(numbers[0]), Floor: fence.Token(numbers[1])}
	if _, err := fence.Next(resource, 0, pass); err != nil {
		return "", fence.Pass{}, err
	}
	return resource, pass, nil
}
