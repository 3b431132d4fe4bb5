// Package save makes a checkpoint of a migration stream.
//
//	in ─► feed ─► parser ─┬─ pages ─► placer ─┬─ hot ──► NVRAM region ─┐
//	                      │                   └─ cold ─┐               │
//	                      └─ all else ─► skeleton ─────┴─► image ──────┴─► transaction
//
// Each stage knows the next, and none the one before. One goroutine runs them; the
// image's Writer compresses and writes with some of its own.
//
// # What QEMU is told
//
// The order of things makes a failure heard. All of RAM is durable before the device
// tail is read (feed), then the image is finished and gets its name, and then only
// does a source with a return path hear that all is well. A save has failed until
// its commit has returned nil, and a panic anywhere is a failure like any other.
package save
