// Package store keeps the checkpoints of many VMs in one place, a directory today:
//
//	DIR/
//	├── store.json                 version, the store's UUID, and where its home is
//	├── lock                       the store lock
//	├── flash-rate.json            how fast this place is read
//	├── sharing.json               there are images that refer to others
//	├── tmp/NAME@N.UUID.part       a save under way, locked by its process
//	├── tmp/UUID.staged            what was received of an image (receive.go)
//	├── tmp/UUID.new               what is to replace something, or a received image
//	├── tmp/UUID.rate              what measures the place (rate.go)
//	├── nvram/UUID.json            an NVRAM file that saves of this store used
//	├── loose/UUID.json            an image outside of the store (loose.go)
//	├── loose/UUID.lock            its lock
//	├── armed/NAME.json            a checkpoint that is armed (armed.go)
//	├── groups/NAME@N.json         checkpoints that were made as one (group.go)
//	├── groups/NAME@N.commit       the same, while their images get their names
//	├── disks/                     indexes of disk images (package disk)
//	├── frozen/UUID                a disk image that is kept with a checkpoint (frozen.go)
//	├── share/DOMAIN/              a trust domain's key (trust.go)
//	├── summaries/NAME             who a VM's images say they are, a cache (summary.go)
//	└── vms/NAME/
//	    ├── 00000001.flic          checkpoint 1: a flash image (package image)
//	    ├── 00000001.UUID.1.moved  what was moved of its NVRAM part to flash (demote.go)
//	    ├── 00000001.touched       what resumes of checkpoint 1 have learned
//	    ├── 00000001.label         what users say of checkpoint 1: tags and a note
//	    ├── 00000002.flic
//	    ├── 00000002.lent          which of its pages of disks pieces of others have (lent.go)
//	    ├── 00000002.UUID.gone     what checkpoint 2 was before it was flattened
//	    └── 00000003.gone          checkpoint 3, removed: empty, or others need it
//
// A checkpoint is visible exactly if its image has its name under vms: that it gets
// it is the commit; for several as one, that their group's record is there (group.go).
// Everything else can be rebuilt from the images, and the store
// touches no object that has another name than these. Something else under vms may be
// a checkpoint that somebody has renamed: as long as it is there, gc frees no NVRAM.
//
// What a store asks of its place is [Dir]. What it stores is opened with package
// checkpoint, which knows no store.
//
// # The lock rule
//
// There are three locks, and this is the only place that says in which order they are taken. Who
// has images locked, as a save has its own all the time, waits for the store lock; who has the
// store lock only tries to lock images. The NVRAM file's is the last.
//
//  1. The store lock covers changes of names: making a .part, the commit, rm, and
//     the changes that gc makes. It is held for milliseconds: never while page data
//     moves, while NVRAM tables are searched or other file systems are looked at.
//  2. Each image is locked as long as it is in use: exclusively by the save that
//     writes it, shared by those who read it, or refer to it in a checkpoint that
//     is not committed yet. rm and gc touch no image and no .part that they cannot
//     lock exclusively. So it is with disk images that are kept: who makes the checkpoint
//     locks them, shared, until it is committed. Readers take this lock while they hold the store lock, so
//     no image is removed between being found and being locked; list and show take
//     none, because what they read of an image is checked, and an image that goes
//     away meanwhile is not there. Summaries are read and written without any. What an open checkpoint refers to is opened without
//     the store lock: it can't go away, and who finds it locked, because somebody frees
//     what nobody needs of it, waits for that moment to pass. A lock is on the image and not on
//     its name, which a receiver gives to a copy that has more of it: so each commit looks
//     whether what it refers to has its name still, and fails if not.
//  3. The NVRAM file's own lock (package nvram), for allocation only.
//
// Before all of them Unite takes one of its own, and those of the index of shared pages are
// never waited for with one of these held. A receiver takes one of each image that it puts
// together (receiveclaim.go), while it has others locked: who waits for those has none of
// these, and waits for an hour at most. Demote takes it too, for each image that it moves pages
// of, and waits for none.
//
// Locks end with their process, so whatever can be locked has no owner any more.
// Every wait for one ends with the context, and after vfs.LockLimit; the one for another
// Unite after uniteWait.
//
// # Numbers
//
// A checkpoint's number is taken when its save begins, and stands in its image,
// which so can be told from a copy in another place. Numbers rise, and no save is given one
// again that was visible; one of a save that failed is. A checkpoint that is received has the
// number that it had, if nobody has it now: so one that was removed comes back, and another
// can have taken its number. UUIDs tell them apart.
//
// # Words
//
// A checkpoint, or an image, is listed if it has its number's name, NNNNNNNN.flic, and else
// unlisted (….gone). Its place is that name's. Which one is there is told by its UUID.
//
// A name, or a number, is taken when a checkpoint or a save under way has it. What an image
// occupies is its length without its holes. To free is to give back what is occupied, here or in
// NVRAM.
//
// A disk slot and an NVRAM slot are numbers of pages; those of disk slots go on behind those
// of NVRAM slots in what is moved. A piece has raw pages of either. What an image has in pieces it
// can lend to others that refer to it.
package store
