// Package lazy serves a stored checkpoint to a stock QEMU that runs on it
// already: it plays the source of a postcopy migration (QEMU's
// docs/devel/migration, "Postcopy") over an exec: child's two pipes.
//
//	              ┌─────────── demanded pages, first of all ────────────┐
//	stdin ─► receiver (REQ_PAGES)                                       ▼
//	                                   opening, device state, RUN ─► pump ─► stdout
//	page tables ─► learned ─► NVRAM ─► flash ─► loader ─ batches ──►────┘
//	                                              └── tier/source: cache ──┘
//
// The guest's devices and RUN go out before any page, so that the guest runs
// within milliseconds at any size of RAM. Until QEMU has loaded the devices, only
// the pages that they ask for are sent. Then the pump sends what the loader brings,
// and looks for a demand between any two writes: the guest's page tables, the pages
// that earlier resumes asked for, the NVRAM part, and last all of flash, segment by
// segment, going on where the guest last asked. With a demanded page go those around
// it that are decoded already, and more of them if the guest reads on.
//
// The pump alone writes, and alone knows what has been sent: a page that comes twice
// pauses the migration (EEXIST, postcopy-paused).
//
// Pages that read as zero are sent only with a demand for them or for pages beside
// them, because RAM that never arrives reads as zero when the migration has ended.
// (Newer QEMUs need them all: Options.ZeroRest.) It ends after the devices are
// loaded, never before.
package lazy
