package tiertest

// Shapes are streams that have, together, all that a reader tells apart.
var Shapes = map[string]Options{
	"plain":       {},
	"live":        {Passes: 3, Resend: 0.4, XBZRLE: true},
	"compressed":  {Compress: 0.5, Shuffle: true},
	"old":         {NoConfiguration: true},
	"small pages": {PageSize: 1024, PageBits: true},
	"large pages": {PageSize: 64 << 10, Advise: true, Blocks: []Block{{Name: "m", Size: 2 << 20}}},
	"foreign":     {DirtyBitmap: true, BlockMigration: true},
	"return path": {ReturnPath: true, Flush: true},
	"shared":      {IgnoreShared: true, Blocks: []Block{{Name: "a", Size: 1 << 20}, {Name: "b", Size: 1 << 20, Shared: true}}},
	"no end":      {NoEnd: true, NoDescription: true},
	"no devices":  {EmptyTail: true},
	"unknown":     {Unknown: Record},
	"section":     {Unknown: Section},
	"virtio-mem":  {Early: 2},
	"QEMU 10's":   {Early: 2, EarlyBehind: true, DirtyBitmap: true},
	"fill":        {Fill: true, Mix: Mix{Zero: 1}},
}
