// Package returnpath encodes and decodes the messages that a migration's
// destination sends to its source.
package returnpath
