// Package lazy serves a stored checkpoint to a stock QEMU that runs on it
// already: it plays the source of a postcopy migration (QEMU's
// docs/devel/migration, "Postcopy") over an exec: child's two pipes.
//
//	              ┌──────────── demanded pages, first of all ────────────┐
//	stdin ─► receiver (REQ_PAGES)                                        ▼
//	                                    opening, device state, RUN ─► pump ─► stdout
//	first pages ─► NVRAM ─► flash ─► loader (decodes ahead) ─ batches ──►┘
//
// The guest's devices and RUN go out before any page, because then the guest
// runs within milliseconds at any size of RAM; the pages the devices ask for
// while they load are served like all others. Then the pump sends, always
// looking for a demand between two writes: the pages that earlier resumes asked
// for, the NVRAM part, and last all of flash, segment by segment.
//
// The pump is the only goroutine that writes, and the only one that knows what
// has been sent: QEMU must get no page twice (EEXIST, postcopy-paused).
//
// Zero pages and pages that were never saved are not sent unless they are asked
// for: RAM that never arrives reads as zero when the migration has ended. It
// must not end before the devices are loaded.
package lazy
