// Package ramparse decodes and encodes the payload of the migration stream's
// RAM section: the records that announce the RAM blocks and carry the pages.
//
// The section is called "ram", has instance 0 and version 4, and comes as one
// START, any number of PARTs and at most one END (a background snapshot has
// none). The payload of each is a run of records and ends with EOS. Numbers
// are big-endian.
//
//	record   be64 address | flags   the flags are the low 10 bits; an address is
//	                                a byte offset within its block, a multiple of
//	                                the target page size
//	         [u8 n, name]           only page records without CONTINUE
//	         body
//
//	flag  name           body
//	002   ZERO           u8 fill
//	004   MEM_SIZE       the blocks, until their sizes add up to the address part:
//	                     u8 n, name, be64 used,
//	                     [be64 page size]   if it differs from the host's (postcopy-ram)
//	                     [be64 GPA]         with x-ignore-shared
//	008   PAGE           the page
//	010   EOS            -
//	020   CONTINUE       with a page record: same block as the record before
//	040   XBZRLE         u8 1, be16 n, n bytes of difference
//	080   HOOK           -
//	100   COMPRESS_PAGE  be32 n, n bytes of zlib stream
//	200   MULTIFD_FLUSH  -
//
// CONTINUE refers to the last page record wherever it was: in an earlier
// section, beyond footers, other sections and commands. So one Decoder serves
// the whole stream.
//
// # Page size
//
// A record does not say how long a page is, and only some streams do: in the
// subsection configuration/target-page-bits, or in the POSTCOPY_ADVISE command.
// Otherwise the Decoder finds it out from the records. See infer.go.
//
// # Passes
//
// A live save sends a page again when the guest has written to it since. The
// stream has no mark for it; PassCounter tells the passes apart.
//
// Sources: QEMU's migration/ram.c (ram_save_setup, save_page_header,
// ram_load_precopy), migration/xbzrle.c, migration/ram-compress.c.
package ramparse
