// Package postcopy encodes and decodes the payloads of the postcopy commands.
package postcopy
