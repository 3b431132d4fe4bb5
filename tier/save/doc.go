// Package save makes a checkpoint of a migration stream.
//
//	in ─► feed ─► parser ─┬─ pages ─► matcher ─► placer ─┬─ hot ──► NVRAM region ─┐
//	                      │              ▲               └─ cold ─┐               │
//	                      │  parent, disks, other images          │               │
//	                      └─ all else ─► skeleton ────────────────┴─► image ──────┴─► transaction
//
// Each stage knows the next, and none the one before. One goroutine runs them; the
// matcher compares pages with the parent checkpoint's, and looks for them on disks and in the
// images that the store has of others, and the image's Writer compresses and writes, with some
// of their own. Without any of these there is no matcher. Saves of a group (Peers) find each
// other's pages in the placer.
//
// What a checkpoint refers to is bytes, and never what another checkpoint's page map
// says of them: entries of the parent's are taken over under names of the new one's
// own. A parent costs no save: what of it can't be read is stored anew.
//
// # What QEMU is told
//
// The order of things makes a failure heard. Of a source that hears nothing all of RAM is
// durable before the device tail is read (feed). Then the image is finished, durable with
// all that is in it, and gets its name, and then only does a source with a return path, or
// who has let a held save go on, hear that all is well. A save has failed until
// its commit has returned nil, and a panic anywhere is a failure like any other.
package save
