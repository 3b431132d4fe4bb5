package domain

import (
	"encoding/binary"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// fileConn sends a file along with the one call that takes one,
// virDomainQemuMonitorCommandWithFiles, of which go-libvirt knows all but that.
// In libvirt's RPC (src/rpc/virnetprotocol.x, virnetmessage.c; big-endian) such a
// call has another type and the number of files behind its header:
//
//	u32 length  u32 program  u32 version  u32 procedure  u32 type = 4
//	u32 serial  u32 status   u32 files = 1   arguments…
//
// and behind the packet comes one byte for each file, which carries it.
type fileConn struct {
	*net.UnixConn
	mu   sync.Mutex
	file *os.File // for the next such call
}

const (
	qemuProgram          = 0x20008087 // src/remote/qemu_protocol.x
	monitorWithFiles     = 7
	callType             = 0
	callWithFilesType    = 4
	packetHeader         = 28
	programAt, procAt    = 4, 12
	typeAt, packetLength = 16, 0
)

// Write gets whole packets, because go-libvirt flushes after each, unless they
// are larger than its buffer of 4 KiB, which getfd is not.
func (c *fileConn) Write(b []byte) (int, error) {
	be := binary.BigEndian
	if len(b) < packetHeader || int(be.Uint32(b[packetLength:])) != len(b) ||
		be.Uint32(b[programAt:]) != qemuProgram || be.Uint32(b[procAt:]) != monitorWithFiles || be.Uint32(b[typeAt:]) != callType {
		return c.UnixConn.Write(b)
	}
	f := c.take()
	if f == nil {
		return c.UnixConn.Write(b)
	}
	p := make([]byte, 0, len(b)+4)
	p = append(p, b[:packetHeader]...)
	p = be.AppendUint32(p, 1)
	p = append(p, b[packetHeader:]...)
	be.PutUint32(p[packetLength:], uint32(len(p)))
	be.PutUint32(p[typeAt:], callWithFilesType)
	if _, err := c.UnixConn.Write(p); err != nil {
		return 0, err
	}
	if _, _, err := c.WriteMsgUnix([]byte{0}, unix.UnixRights(int(f.Fd())), nil); err != nil {
		return 0, err
	}
	return len(b), nil
}

// give sets the file for the next call, which the caller makes before another is
// given. The file stays the caller's.
func (c *fileConn) give(f *os.File) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.file = f
}

func (c *fileConn) take() *os.File {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.file
	c.file = nil
	return f
}
