// Package session is what is done with one virtual machine from outside: its
// checkpoint, its resume and recovery, the search for its working set. It puts
// together what the engines (tier/save, tier/restore, tier/lazy) do with a stream and
// what package migration does with a QEMU; the command adds flags and words.
//
//	Track       ─► rounds ─► migration.Track                  ─► a working set
//	Checkpoint  ─► (Track), migration.Checkpoint ─► save.Run  ─► a checkpoint
//	…Group      ─► several of them beside one another, which meet (group.go)
//	Resume      ─► migration.Resume ─► a server, another process ─► restore, lazy
//	            ─► domain.Restore   ─► a server, in this process ─► restore, lazy
//
// With whom, a [Target] says. How a resume hears of its server, control.go.
package session
