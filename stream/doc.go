// Package stream takes QEMU's migration stream apart into frames and puts it
// together again. It knows the frames, not what is in them: pages are package
// ramparse's, and the device sections stay bytes.
//
// Numbers are big-endian. This is the stream of a precopy migration as QEMU
// writes it to an exec: child:
//
//	'Q' 'E' 'V' 'M' be32 3                                          Header
//	07 be32 n, machine type                                         Configuration
//	   [05 u8 n, name, be32 version, body]...                       Subsection
//	[08 be16 command, be16 n, payload]...                           CommandFrame
//	[04 be32 id ... 7e be32 id]...                                  SectionEarly, Footer
//	01 be32 id, u8 n, name, be32 instance, be32 version             SectionStart
//	   payload, of no stated length
//	7e be32 id                                                      Footer
//	02 be32 id  payload  7e be32 id                                 SectionPart, Footer
//	...
//	03 be32 id  payload  7e be32 id                                 SectionEnd, Footer
//	-- here the device tail begins --                               SectionFull
//	04 be32 id, u8 n, name, be32 instance, be32 version
//	   body, of no stated length
//	7e be32 id
//	...
//	00                                                              EOF
//	06 be32 n, JSON                                                 the vmdescription
//
// What early sections are, and how they are delimited, is in early.go.
//
// Machine types before 2.4 have neither configuration nor footers. Sections of
// several devices interleave between START and END. Commands stand anywhere
// between sections. A background snapshot has no ram END.
//
// # The device tail
//
// The bodies of FULL sections can be delimited only by who made them, or by
// the vmdescription that follows. So the Reader stops where the first begins,
// and the rest is the tail, which a TailScanner collects. That suits the one
// thing that makes exec: safe: QEMU's migration can still fail as long as its
// child has not read the tail, so a save leaves it in the pipe until everything
// else is durable. A Cursor therefore reads no further than it is told to.
//
// # Hostile input
//
// Every length is capped before it is used. Errors are *Error with the offset
// and match one of ErrNotStream, ErrTruncated, ErrDamaged, ErrUnknown, or the
// error of the underlying reader.
//
// Sources: QEMU's migration/savevm.c (qemu_savevm_state_*, qemu_loadvm_*),
// migration/vmstate.c, migration/block.c, migration/block-dirty-bitmap.c.
package stream
