// Package nvram keeps the hot pages of checkpoints, raw, in one file of
// byte-addressable persistent memory: a file on a file system mounted with
// -o dax, a /dev/pmem block device, or for trials any file.
//
// # The file
//
//	extent 0          1        2           1023     1024       1025
//	┌────────────────┬────────┬────────┬──┬────────┬──────────┬────────┬──
//	│ headers, table │ data   │ data   │ …│ data   │ table    │ data   │ …
//	└────────────────┴────────┴────────┴──┴────────┴──────────┴────────┴──
//	└──────────────── group 0: 256 MiB ────────────┘└──── group 1 …
//
// An extent is 256 KiB. The first one of each group holds the owner table: one
// line of 64 bytes an extent, which is all zero if the extent is free. So the
// file can grow by appending, and a group that is not there yet has a table of
// zeros. docs/format-nvram.md has every byte.
//
// # Who may do what when
//
// The file is shared by many checkpoints, processes and stores, and there is
// one lock rule: whoever changes a header, an owner table or the file's length
// holds the exclusive flock on the file, for the time of the change and its
// sync; whoever reads the tables as a whole holds it shared. Pages are read and
// written without a lock, by the owner of their extent only. A checkpoint's
// reader must keep the checkpoint from being removed by its own means (the
// store's lock): FreeOwner does not look for readers.
//
// # What a crash leaves
//
// Table entries are durable before Reserve returns, and pages before Sync
// returns. A checkpoint that was committed after both has its extents, whole.
// Anything else that a crash leaves, extents of owners that were never
// committed, or removed, is found by [File.Sweep], which asks the store who is
// live.
package nvram
