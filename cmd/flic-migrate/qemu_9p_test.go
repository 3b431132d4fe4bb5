package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/flic-migrate/flic-migrate/qmp/migration"
	"github.com/flic-migrate/flic-migrate/qmp/qemutest"
)

// qtest reads and writes a guest's memory and devices as a driver in it would, over
// QEMU's protocol for its own tests (docs/devel/testing/qtest.rst): a line for each
// command, and one for its answer, "OK" with what was read.
type qtest struct {
	t     *testing.T
	conn  net.Conn
	lines *bufio.Reader
}

// withQtest adds the socket to c.
func withQtest(t *testing.T, c qemutest.Config) (_ qemutest.Config, socket string) {
	dir, err := os.MkdirTemp("", "qtest") // a socket's path is short of space
	ok(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "s")
	c.Args = append(slices.Clone(c.Args), "-chardev", "socket,id=qtest,server=on,wait=off,path="+socket, "-qtest", "chardev:qtest", "-qtest-log", "none")
	return c, socket
}

func dialQtest(t *testing.T, socket string) *qtest {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	ok(t, err)
	t.Cleanup(func() { conn.Close() })
	return &qtest{t, conn, bufio.NewReader(conn)}
}

func (q *qtest) do(format string, args ...any) string {
	q.t.Helper()
	_, err := fmt.Fprintf(q.conn, format+"\n", args...)
	ok(q.t, err)
	line, err := q.lines.ReadString('\n')
	ok(q.t, err)
	answer, good := strings.CutPrefix(strings.TrimSpace(line), "OK")
	if !good {
		q.t.Fatalf("%s: %s", fmt.Sprintf(format, args...), line)
	}
	return strings.TrimSpace(answer)
}

func (q *qtest) read32(addr uint64) uint32 {
	q.t.Helper()
	n, err := strconv.ParseUint(q.do("readl %#x", addr), 0, 64)
	ok(q.t, err)
	return uint32(n)
}

func (q *qtest) write32(addr uint64, value uint32) {
	q.t.Helper()
	q.do("writel %#x %#x", addr, value)
}

func (q *qtest) write(addr uint64, b []byte) {
	q.t.Helper()
	q.do("write %#x %#x 0x%x", addr, len(b), b)
}

// virtqueue is the first queue of a virtio-mmio device: Virtual I/O Device (VIRTIO)
// 1.2, 4.2.4, the legacy interface.
type virtqueue struct {
	*qtest
	device uint64 // its registers
	at     uint64 // in guest memory: a page of descriptors and requests, a page of used ones
	sent   uint16
}

// Registers.
const (
	mmioMagic, mmioDevice                = 0x00, 0x08
	mmioPageSize, mmioQueue, mmioSize    = 0x28, 0x30, 0x38
	mmioAlign, mmioPage, mmioNotify      = 0x3c, 0x40, 0x50
	mmioStatus, mmioReady, mmioQueueSize = 0x70, 7, 8
)

// newVirtqueue sets up the device that has this number among microvm's.
func newVirtqueue(q *qtest, number uint32, at uint64) *virtqueue {
	q.t.Helper()
	for device := uint64(0xfeb00000); device < 0xfeb00000+24*512; device += 512 {
		if q.read32(device+mmioMagic) != 0x74726976 || q.read32(device+mmioDevice) != number {
			continue
		}
		q.write32(device+mmioPageSize, 4096)
		q.write32(device+mmioQueue, 0)
		q.write32(device+mmioSize, mmioQueueSize)
		q.write32(device+mmioAlign, 4096)
		q.write32(device+mmioPage, uint32(at/4096))
		q.write32(device+mmioStatus, mmioReady)
		return &virtqueue{q, device, at, 0}
	}
	q.t.Fatalf("there is no virtio device %d", number)
	return nil
}

// ask gives the device a request and waits until it has answered.
func (v *virtqueue) ask(request []byte) (answer []byte) {
	v.t.Helper()
	const asked, answered, length = 1024, 2048, 1024 // from at on
	le := binary.LittleEndian
	v.write(v.at+asked, request)
	// Two descriptors: the request, and then room for the answer, which is written.
	table := le.AppendUint64(nil, v.at+asked)
	table = le.AppendUint32(table, uint32(len(request)))
	table = le.AppendUint16(le.AppendUint16(table, 1), 1)
	table = le.AppendUint64(table, v.at+answered)
	table = le.AppendUint32(table, length)
	table = le.AppendUint16(le.AppendUint16(table, 2), 0)
	v.write(v.at, table)
	// The ring of those that are available, behind the table: the first descriptor.
	ring := v.at + 16*mmioQueueSize
	v.write(ring+4+2*uint64(v.sent%mmioQueueSize), []byte{0, 0})
	v.sent++
	v.write(ring+2, le.AppendUint16(nil, v.sent))
	v.write32(v.device+mmioNotify, 0)
	until(v.t, "the device's answer", func() bool { return uint16(v.read32(v.at+4096)>>16) == v.sent })
	for i := range uint64(16) {
		answer = le.AppendUint32(answer, v.read32(v.at+answered+4*i))
	}
	return answer
}

// message is one of 9P: its length, its type, a tag, and what belongs to it.
func message(kind byte, tag uint16, parts ...any) []byte {
	le := binary.LittleEndian
	b := le.AppendUint16([]byte{0, 0, 0, 0, kind}, tag)
	for _, p := range parts {
		switch p := p.(type) {
		case uint32:
			b = le.AppendUint32(b, p)
		case string:
			b = append(le.AppendUint16(b, uint16(len(p))), p...)
		}
	}
	le.PutUint32(b, uint32(len(b)))
	return b
}

// TestMounted9P: while the guest has mounted a directory of the host's, QEMU does not
// migrate. A checkpoint says so, in all modes and armed, and the guest runs on; once it
// is unmounted there is one.
func TestMounted9P(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	c, socket := withQtest(t, microvm.tiny(t, "64M", varied(256), 10))
	dir := t.TempDir()
	c.Args = append(c.Args, "-global", "virtio-mmio.force-legacy=true", "-fsdev", "local,id=fs,security_model=none,path="+dir,
		"-device", "virtio-9p-device,fsdev=fs,mount_tag=share")
	vm := qemutest.Start(t, c)
	vm.WaitFor(t, `tick 00000002\r`)
	before := settings(t, vm)

	v := newVirtqueue(dialQtest(t, socket), 9, 32<<20)
	const tversion, tattach, tclunk = 100, 104, 120
	const noTag, noFID = 0xffff, 0xffffffff
	mount := func() {
		t.Helper()
		for _, m := range [][]byte{
			message(tversion, noTag, uint32(8192), "9P2000.L"),
			message(tattach, 1, uint32(1), uint32(noFID), "root", "", uint32(0)),
		} {
			if answer := v.ask(m); answer[4] != m[4]+1 {
				t.Fatalf("9P: %x is answered by %x", m, answer)
			}
		}
	}
	mount()
	for _, flags := range [][]string{{"--mode", "stop"}, {"--mode", "live"}, {"--mode", "background"}, {"--arm"}} {
		l.attempts(t, nil, vm.Socket, flags...).fails(exitFailed, migration.ErrBlocked.Error(), "VirtFS", dir)
		runsOn(t, vm)
		if after := settings(t, vm); after != before {
			t.Errorf("%q: settings were\n%s\nand are\n%s", flags, before, after)
		}
	}
	l.nothing(t)

	// A bare save: QEMU does not start it.
	if err := migration.Start(t.Context(), vm.QMP, l.save()); err == nil || !strings.Contains(err.Error(), "VirtFS") {
		t.Errorf("migrate: %v", err)
	}
	runsOn(t, vm)
	l.nothing(t)

	if m := message(tclunk, 2, uint32(1)); v.ask(m)[4] != tclunk+1 {
		t.Fatal("9P: not unmounted")
	}
	l.checkpoint(t, vm)
	runsOn(t, vm)
	l.holds(t, "vm@1")
}
