// Package progress is what a save and a restore tell of themselves while they run.
package progress

import "time"

// State is how far a save, a restore or a check is.
type State struct {
	Phase    string // "ram", "sync", "tail", "commit"; "restore", "verify"
	Pages    int64  // done
	PagesAll int64  // 0 while not known
	BytesIn  int64
	BytesOut int64 // written to flash and NVRAM, or to the stream
}

// Every is the time between two reports: often enough for a person who watches.
const Every = 200 * time.Millisecond
