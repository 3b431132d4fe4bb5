// Package tier saves a migration stream as a checkpoint in two tiers and gives
// it back: FLIC's hot pages raw in an NVRAM file, everything else compressed in
// a flash image.
//
//	save:    stdin ─► feed ─► stream.Reader ─► ramparse.Decoder ─► placer ─┬─► nvram.Region
//	                 (holds     (frames)         (page records)   (zero,   └─► image.Writer
//	                  back)        │                               dedup,          ▲
//	                               └── everything else ─► skeleton hot) ───────────┘
//	                                                      page map ────────────────┘
//	         … RAM durable ─► device tail ─► footer ─► fsync ─► rename ─► SHUT
//
//	restore: checkpoint ─► skeleton.Play ─► replayer ─► stdout
//	              └─► planner ─► workers (decompress) ─┘
//
// The packages below it, by noun: store (names, locks, commit), checkpoint (the
// read side), image (the flash image), loose (images that are in no store), nvram
// (the NVRAM file), pagemap, skeleton, dedup, workingset, integrity (the checksum,
// and the error of all that fail it), and vfs, through which all of them write.
package tier
