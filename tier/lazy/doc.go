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
// runs within milliseconds at any size of RAM; until QEMU has loaded them there
// is nothing but the pages they ask for. Then the pump sends, always looking for
// a demand between two writes: the pages that earlier resumes asked for, the
// NVRAM part, and last all of flash, segment by segment, going on where the guest
// last asked. What costs no more decoding goes with a demanded page, and more of
// it if the guest reads on.
//
// The pump is the only goroutine that writes, and the only one that knows what
// has been sent: QEMU must get no page twice (EEXIST, postcopy-paused).
//
// Zero pages and pages that were never saved are not sent unless they or pages
// beside them are asked for: RAM that never arrives reads as zero when the migration has ended. It
// must not end before the devices are loaded.
package lazy
