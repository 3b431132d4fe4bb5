package tier_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/flic-migrate/flic-migrate/tier/image"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
	"github.com/flic-migrate/flic-migrate/tier/save"
	"github.com/flic-migrate/flic-migrate/tier/source"
	"github.com/flic-migrate/flic-migrate/tier/store"
	"github.com/flic-migrate/flic-migrate/tier/tiertest"
	"github.com/flic-migrate/flic-migrate/tier/transfer"
	"github.com/flic-migrate/flic-migrate/tier/vfs/crashfs"
	"github.com/flic-migrate/flic-migrate/tier/workingset"
)

// sent is the stream of checkpoints for a store that has what have says; nil: nothing.
func (l *lab) sent(have *transfer.Have, refs ...store.Ref) ([]byte, []store.Sent, error) {
	if have == nil {
		have = transfer.NewHave()
	}
	var b bytes.Buffer
	w, err := transfer.NewWriter(&b)
	if err != nil {
		return nil, nil, err
	}
	var list []store.Sent
	for _, r := range refs {
		s, err := l.st.Send(context.Background(), r, w, have, store.SendOptions{})
		if err != nil {
			return b.Bytes(), list, err
		}
		list = append(list, s)
	}
	err = w.Close()
	return b.Bytes(), list, err
}

// takes receives a stream.
func (l *lab) takes(b []byte, as store.Ref) (list []store.Received, err error) {
	return l.takesWith(b, store.ReceiveOptions{As: as})
}

func (l *lab) takesWith(b []byte, o store.ReceiveOptions) (list []store.Received, err error) {
	o.Done = func(r store.Received) error {
		list = append(list, r)
		return nil
	}
	err = l.st.Receive(context.Background(), bytes.NewReader(b), o)
	return list, err
}

// hot has a receiver put hot pages into the lab's NVRAM file.
func (l *lab) hot() store.ReceiveOptions {
	return store.ReceiveOptions{NVRAM: store.Reservation{Path: l.nvram, Capacity: 64 << 20}}
}

// has is what a store has, as it comes over a wire.
func (l *lab) has(t testing.TB) *transfer.Have {
	t.Helper()
	h, err := l.st.Have(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := h.Write(&b); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(strings.NewReader(b.String() + "rest"))
	back, err := transfer.ReadHave(r)
	if err != nil || !reflect.DeepEqual(h, back) {
		t.Fatalf("%+v came as %+v, %v", h, back, err)
	}
	if rest, _ := r.ReadString(0); rest != "rest" {
		t.Fatalf("%q is left behind it", rest)
	}
	return back
}

// ships sends a checkpoint to another store, which says first what it has.
func (l *lab) ships(t testing.TB, to *lab, ref store.Ref) (store.Sent, store.Received) {
	t.Helper()
	b, sent, err := l.sent(to.has(t), ref)
	if err != nil {
		t.Fatalf("%v was not sent: %v", ref, err)
	}
	got, err := to.takes(b, store.Ref{})
	if err != nil {
		t.Fatalf("%v was not received: %v", ref, err)
	}
	return sent[0], got[0]
}

// empty fails if a store from which all was removed has anything but names left.
func (l *lab) empty(t testing.TB) {
	t.Helper()
	if rep, err := l.st.GC(context.Background()); err != nil || len(rep.Warnings) > 0 {
		t.Errorf("gc: %+v, %v", rep, err)
	}
	for _, name := range l.tree(t) {
		fi, err := l.fs.Stat(filepath.Join(l.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(name, "vms/") && fi.Size() > 0 && strings.HasSuffix(name, ".flic") || strings.HasSuffix(name, ".moved") ||
			strings.HasSuffix(name, ".gone") && fi.Size() > 0 || strings.HasPrefix(name, "tmp/") {
			t.Errorf("left: %s, %d bytes", name, fi.Size())
		}
	}
}

// TestTransfer copies checkpoints of a chain with hot pages, in any order, between two
// stores that use one NVRAM file, while checkpoints are removed, moved and saved in both.
// Each restores in either store as it was saved, as long as it is there; and when all is
// removed all is free.
func TestTransfer(t *testing.T) {
	for seed := range uint64(fewer(8)) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			disk := crashfs.New(0)
			a, b := newLab(t, disk, "/a"), newLab(t, disk, "/b")
			b.nvram = a.nvram
			rnd := rand.New(rand.NewPCG(seed, 1))
			in := map[*lab]map[store.Ref]*tiertest.Stream{a: a.hotGenerations(t, "vm", 6, 1<<20, 0.7), b: {}}
			sent := int64(0)
			for step := range 24 {
				from, to := a, b
				if rnd.IntN(5) == 0 {
					from, to = b, a
				}
				refs := slices.SortedFunc(maps.Keys(in[from]), func(x, y store.Ref) int { return x.N - y.N })
				if len(refs) == 0 {
					continue
				}
				ref := refs[rnd.IntN(len(refs))]
				switch op := rnd.IntN(8); {
				case op < 4:
					s, r := from.ships(t, to, ref)
					if _, there := in[to][ref]; there != r.Already || there != (s.Bytes == 0) || r.Ref != ref || r.UUID != s.UUID {
						t.Fatalf("step %d: %v was there: %v; sent %+v, received %+v", step, ref, there, s, r)
					}
					sent += s.Bytes
					in[to][ref] = in[from][ref]
				case op == 4:
					if err := from.remove(ref); err != nil {
						t.Fatalf("step %d: %v", step, err)
					}
					delete(in[from], ref)
				case op == 5:
					from.demote(t, 1)
				case op == 6:
					if rep, err := from.st.GC(context.Background()); err != nil || len(rep.Warnings) > 0 {
						t.Fatalf("step %d: gc: %+v, %v", step, rep, err)
					}
				case from == a:
					s := in[a][ref]
					to, _ := a.save(t, s, save.Options{Parent: ref.String(), WorkingSet: hotSet(t, s, every(2)), NVRAMSize: 64 << 20})
					in[a][to] = s
				}
				for l, model := range in {
					for ref, s := range model {
						l.holds(t, ref, s)
					}
				}
				if t.Failed() {
					t.Fatalf("after step %d", step)
				}
			}
			if sent == 0 {
				t.Error("nothing was sent")
			}
			for l, model := range in {
				for ref := range model {
					if err := l.remove(ref); err != nil {
						t.Error(err)
					}
				}
				l.noLeaks(t)
				l.empty(t)
			}
		})
	}
}

// TestTransferLittle: of an increment whose parent is there little is sent, whether that is
// listed there, or a part of it came with another.
func TestTransferLittle(t *testing.T) {
	a, b, c := newLab(t, crashfs.New(0), "/"), newLab(t, crashfs.New(0), "/"), newLab(t, crashfs.New(0), "/")
	model := a.hotGenerations(t, "vm", 4, 2<<20, 0.1)
	first, _ := a.ships(t, b, store.Ref{VM: "vm", N: 1})
	for n := 2; n <= 4; n++ {
		if s, _ := a.ships(t, b, store.Ref{VM: "vm", N: n}); s.Images != 1 || s.Bytes*2 > first.Bytes {
			t.Errorf("the first: %+v, an increment %+v", first, s)
		}
	}
	// Alone it comes with what it needs of the others, which are not listed.
	alone, _ := a.ships(t, c, store.Ref{VM: "vm", N: 3})
	if alone.Images < 2 {
		t.Errorf("%+v", alone)
	}
	if refs, err := c.st.List(t.Context(), ""); err != nil || len(refs) != 1 {
		t.Errorf("listed: %v, %v", refs, err)
	}
	if s, _ := a.ships(t, c, store.Ref{VM: "vm", N: 4}); s.Bytes*2 > alone.Bytes {
		t.Errorf("after one that needs the same: %+v; that one %+v", s, alone)
	}
	// And when more of them comes, nothing that was there is lost.
	a.ships(t, c, store.Ref{VM: "vm", N: 1})
	for l, refs := range map[*lab][]int{b: {1, 2, 3, 4}, c: {1, 3, 4}} {
		for _, n := range refs {
			ref := store.Ref{VM: "vm", N: n}
			l.holds(t, ref, model[ref])
		}
		l.noLeaks(t)
	}
	// A guest that goes on there is saved against what came.
	s := tiertest.New(tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 2 << 20}}, Passes: 5, Resend: 0.1})
	ref, meta := b.save(t, s, save.Options{SegmentPages: 8})
	if ref.N != 5 || meta.Report.Parent != "vm@4" || meta.Report.Unchanged == 0 {
		t.Errorf("%v, %+v", ref, meta.Report)
	}
	b.holds(t, ref, s)
	// And comes back.
	b.ships(t, a, ref)
	a.holds(t, ref, s)
}

// twoOf is a store with an increment that has hot pages, and its stream for one that has
// nothing.
func twoOf(t testing.TB) (a *lab, ref store.Ref, s *tiertest.Stream, b []byte) {
	t.Helper()
	a = newLab(t, crashfs.New(0), "/")
	for ref, s := range a.hotGenerations(t, "vm", 2, 1<<20, 0.4) {
		if ref.N == 2 {
			b, _, err := a.sent(nil, ref)
			if err != nil {
				t.Fatal(err)
			}
			return a, ref, s, b
		}
	}
	panic("no second")
}

// TestTransferCut cuts the stream off everywhere. Nothing is there then, gc keeps what has
// come, and another stream goes on behind it.
func TestTransferCut(t *testing.T) {
	a, ref, s, whole := twoOf(t)
	skipped := false
	for n := 0; n < len(whole); n += 16 << 10 {
		b := newLab(t, crashfs.New(0), "/")
		_, err := b.takes(whole[:n], store.Ref{})
		want := transfer.ErrTruncated
		if n < 16 {
			want = transfer.ErrNotStream
		}
		var at *transfer.Error
		if errors.Is(err, nil) && n == 16 || !errors.As(err, &at) || !errors.Is(err, want) || at.Offset > int64(n) {
			t.Fatalf("cut at %d: %v", n, err)
		}
		if refs, err := b.st.List(t.Context(), ""); err != nil || len(refs) > 0 {
			t.Fatalf("cut at %d: %v, %v", n, refs, err)
		}
		b.noLeaks(t)
		rest, sent, err := a.sent(b.has(t), ref)
		if err != nil {
			t.Fatal(err)
		}
		if back := sent[0].Skipped; back > int64(n) || n > 64<<10 && int64(n)-back > 64<<10+int64(n/16) {
			t.Errorf("cut at %d: %d bytes are not sent again", n, back)
		}
		skipped = skipped || sent[0].Skipped > int64(len(whole)/2)
		// Once more, at another place.
		if _, err := b.takes(rest[:len(rest)/2], store.Ref{}); !errors.Is(err, transfer.ErrTruncated) {
			t.Fatal(err)
		}
		a.ships(t, b, ref)
		b.holds(t, ref, s)
		for _, name := range b.tree(t) {
			if strings.HasPrefix(name, "tmp/") {
				t.Errorf("cut at %d: left %s", n, name)
			}
		}
	}
	if !skipped {
		t.Error("nothing was gone on with")
	}
}

// TestTransferStale: what was cut off is kept for three days, and then gc's.
func TestTransferStale(t *testing.T) {
	_, _, _, whole := twoOf(t)
	synctest.Test(t, func(t *testing.T) {
		b := newLab(t, crashfs.New(0), "/")
		if _, err := b.takes(whole[:len(whole)/2], store.Ref{}); err == nil {
			t.Fatal("half of a stream was taken")
		}
		staged := func() (list []string) {
			return slices.DeleteFunc(b.tree(t), func(n string) bool { return !strings.HasPrefix(n, "tmp/") })
		}
		time.Sleep(store.StagedFor - time.Hour)
		if rep, err := b.st.GC(t.Context()); err != nil || rep.Parts > 0 || len(staged()) == 0 {
			t.Errorf("gc before: %+v, %v; left %q", rep, err, staged())
		}
		time.Sleep(2 * time.Hour)
		if rep, err := b.st.GC(t.Context()); err != nil || rep.Parts == 0 || len(staged()) > 0 {
			t.Errorf("gc afterwards: %+v, %v; left %q", rep, err, staged())
		}
		// Who knows that none goes on need not wait.
		if _, err := b.takes(whole[:len(whole)/2], store.Ref{}); err == nil {
			t.Fatal("half of a stream was taken")
		}
		if rep, err := b.st.GCAfter(t.Context(), store.DefaultGrace, 0); err != nil || rep.Parts == 0 || len(staged()) > 0 {
			t.Errorf("gc at once: %+v, %v; left %q", rep, err, staged())
		}
	})
}

// TestTransferKilled ends the receiver at every operation on its disk, and lets each fail.
// What was there is there; what was sent is, if it was said; and it can be sent again.
func TestTransferKilled(t *testing.T) {
	a := newLab(t, crashfs.New(0), "/")
	first, second := small(1), grown(1)
	o := smallOptions(t, first)
	was, _ := a.save(t, first, o)
	ref, meta := a.save(t, second, o)
	if meta.Report.Parent != was.String() {
		t.Fatalf("%+v", meta.Report)
	}
	model := map[store.Ref]*tiertest.Stream{was: first, ref: second}
	for _, there := range []bool{false, true} {
		t.Run(fmt.Sprint("parent there ", there), func(t *testing.T) {
			begin := func(t *testing.T) (*crashfs.FS, *lab, []byte) {
				disk := crashfs.New(0)
				b := newLab(t, disk, "/")
				if there {
					a.ships(t, b, was)
				}
				whole, _, err := a.sent(b.has(t), ref)
				if err != nil {
					t.Fatal(err)
				}
				return disk, b, whole
			}
			check := func(t *testing.T, b *lab, must, cut bool) {
				t.Helper()
				refs, err := b.st.List(t.Context(), "")
				if err != nil || must && !slices.Contains(refs, ref) || there && !slices.Contains(refs, was) {
					t.Fatalf("listed %v, %v", refs, err)
				}
				for _, r := range refs {
					b.holds(t, r, model[r])
				}
				if cut {
					// A power cut can have left less than the length of what was staged says.
					// That is found out at the end, and what there was is given up.
					again, _, err := a.sent(b.has(t), ref)
					if err != nil {
						t.Fatal(err)
					}
					if _, err := b.takes(again, store.Ref{}); err != nil && !integrity.IsCorrupt(err) {
						t.Fatal(err)
					}
				}
				a.ships(t, b, ref)
				b.holds(t, ref, second)
			}
			ops := everyOp(t, func(t *testing.T, n int) bool {
				disk, b, whole := begin(t)
				disk.KillAt(n)
				_, err := b.takes(whole, store.Ref{})
				for seed := range uint64(3) {
					check(t, b.on(t, disk.CrashClone(seed)), err == nil, true)
				}
				check(t, b.on(t, disk.Fork()), err == nil, false)
				return disk.Killed()
			})
			if ops < 20 {
				t.Errorf("only %d operations", ops)
			}
			for name, fault := range faultsAt {
				t.Run(name, func(t *testing.T) {
					everyOp(t, func(t *testing.T, n int) bool {
						disk, b, whole := begin(t)
						before := len(disk.Ops())
						fault.arm(disk, n)
						_, err := b.takes(whole, store.Ref{})
						hit := len(disk.Ops())-before > n
						if err != nil && !errors.Is(err, fault.err) {
							t.Errorf("receive: %v", err)
						}
						disk.Heal()
						b.noLeaks(t)
						check(t, b, err == nil, false)
						return hit
					})
				})
			}
		})
	}
}

// TestTransferDamaged changes each kind of byte in a stream: it is refused, with its place,
// and nothing comes of it.
func TestTransferDamaged(t *testing.T) {
	_, _, _, whole := twoOf(t)
	b := newLab(t, crashfs.New(0), "/")
	for off := 0; off < len(whole); off += 1 + len(whole)/150 {
		bad := bytes.Clone(whole)
		bad[off] ^= 4
		_, err := b.takes(bad, store.Ref{})
		var at *transfer.Error
		if !errors.As(err, &at) || !(errors.Is(err, transfer.ErrDamaged) || errors.Is(err, transfer.ErrNotStream) || errors.Is(err, transfer.ErrTruncated)) || at.Offset > int64(off) && !errors.Is(err, transfer.ErrTruncated) {
			t.Errorf("byte %d: %v", off, err)
		}
	}
	for name, bad := range map[string][]byte{
		"a record twice":    slices.Concat(whole[:16], whole[16:900], whole[16:]),
		"one in between":    slices.Concat(whole[:len(whole)/2], []byte{3, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, 4}, whole[len(whole)/2:]),
		"something behind":  append(bytes.Clone(whole), 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
		"a long record":     slices.Concat(whole[:16], []byte{1, 0, 0, 0, 255, 255, 255, 255}),
		"not much of one":   slices.Concat(whole[:16], []byte{1, 0, 0, 0, 0, 0, 255, 0}),
		"another's version": append([]byte("FLICSND\x00\x03\x00\x00\x00"), 0, 0, 0, 0),
	} {
		if _, err := b.takes(bad, store.Ref{}); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	b.noLeaks(t)
}

// retold is a stream as begin and data change what its records say, with checksums that are right.
func retold(t *testing.T, whole []byte, begin func(*transfer.Checkpoint), data func(b []byte)) []byte {
	t.Helper()
	rd, err := transfer.NewReader(bytes.NewReader(whole))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w, err := transfer.NewWriter(&out)
	if err != nil {
		t.Fatal(err)
	}
	for {
		k, p, err := rd.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		switch k {
		case transfer.Begin:
			var c *transfer.Checkpoint
			if c, err = rd.ParseBegin(p); err == nil {
				begin(c)
				err = w.Begin(c)
			}
		case transfer.Image:
			var n int
			if n, err = rd.ParseImage(p, 1<<10); err == nil {
				err = w.Image(n)
			}
		case transfer.Data:
			var pos int64
			var b []byte
			if pos, b, err = rd.ParseData(p, 0, 1<<40); err == nil {
				data(b)
				err = w.Data(pos, b)
			}
		case transfer.End:
			err = w.End()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// forged is a stream in which a bit of the nth DATA record is another, counted from the end
// if nth is below 0, and how many of these there are.
func forged(t *testing.T, whole []byte, nth int) (out []byte, total int) {
	t.Helper()
	asItWas := func(*transfer.Checkpoint) {}
	retold(t, whole, asItWas, func([]byte) { total++ })
	n := 0
	return retold(t, whole, asItWas, func(b []byte) {
		if n == (nth+total)%total {
			b[len(b)/2] ^= 1
		}
		n++
	}), total
}

// TestTransferForged: bytes that are under a right checksum in the stream, and are none of
// the image's, are found, and leave nothing that would be in the way of the right ones.
func TestTransferForged(t *testing.T) {
	a, ref, s, whole := twoOf(t)
	for _, nth := range []int{1, 5, -1} {
		out, total := forged(t, whole, nth)
		b := newLab(t, crashfs.New(0), "/")
		if _, err := b.takes(out, store.Ref{}); !integrity.IsCorrupt(err) {
			t.Errorf("DATA %d of %d changed: %v", nth, total, err)
		}
		if refs, err := b.st.List(t.Context(), ""); err != nil || len(refs) > 0 {
			t.Errorf("%v, %v", refs, err)
		}
		if h := b.has(t); len(h.Staged) > 0 {
			t.Errorf("it is to be gone on with: %v", h.Staged)
		}
		a.ships(t, b, ref)
		b.holds(t, ref, s)
		b.noLeaks(t)
	}
}

// TestTransferAmid: neither a checkpoint nor a group begins amid a checkpoint, also amid one that is
// there already.
func TestTransferAmid(t *testing.T) {
	a, ref, _, whole := twoOf(t)
	b := newLab(t, crashfs.New(0), "/")
	for _, there := range []bool{false, true} {
		if there {
			a.ships(t, b, ref)
		}
		for _, k := range []transfer.Kind{transfer.Begin, transfer.Group} {
			var out bytes.Buffer
			w, err := transfer.NewWriter(&out)
			if err != nil {
				t.Fatal(err)
			}
			retold(t, whole, func(c *transfer.Checkpoint) {
				if err = w.Begin(c); err != nil {
					return
				}
				if k == transfer.Begin {
					err = w.Begin(c)
				} else {
					err = w.Group(&transfer.GroupHead{Name: "g", Number: 1, UUID: c.UUID, Members: []transfer.Member{{VM: c.VM, Number: c.Number, UUID: c.UUID}}})
				}
			}, func([]byte) {})
			if err == nil {
				err = w.Close()
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := b.takes(out.Bytes(), store.Ref{}); !errors.Is(err, transfer.ErrDamaged) || !strings.Contains(err.Error(), fmt.Sprintf("kind %d amid a checkpoint", k)) {
				t.Errorf("kind %d, there already %v: %v", k, there, err)
			}
		}
	}
	b.noLeaks(t)
}

// TestTransferSaid: what is said of a checkpoint before it comes is compared with what it is.
// What it refers to is held by what was said, and by that it is looked for.
func TestTransferSaid(t *testing.T) {
	a, ref, s, _ := twoOf(t)
	first := store.Ref{VM: ref.VM, N: 1}
	for what, lie := range map[string]func(*transfer.Checkpoint){
		"has less":       func(c *transfer.Checkpoint) { c.Has = nil },
		"another origin": func(c *transfer.Checkpoint) { c.Origin[0]++ },
	} {
		b := newLab(t, crashfs.New(0), "/")
		a.ships(t, b, first)
		whole, _, err := a.sent(b.has(t), ref)
		if err != nil {
			t.Fatal(err)
		}
		out := retold(t, whole, lie, func([]byte) {})
		if got, err := b.takes(out, store.Ref{}); !errors.Is(err, transfer.ErrDamaged) {
			t.Errorf("%s: %+v, %v", what, got, err)
		}
		if refs, err := b.st.List(t.Context(), ""); err != nil || !slices.Equal(refs, []store.Ref{first}) {
			t.Errorf("%s: %v, %v", what, refs, err)
		}
		// The right stream goes on behind what has come.
		if again, _ := a.ships(t, b, ref); again.Skipped == 0 {
			t.Errorf("%s: %+v", what, again)
		}
		b.holds(t, ref, s)
		b.noLeaks(t)
	}
}

// TestTransferBare: what lies under a number without an image is not what users say of a
// checkpoint that is received with it.
func TestTransferBare(t *testing.T) {
	a, b := newLab(t, crashfs.New(0), "/"), newLab(t, crashfs.New(0), "/")
	s := small(1)
	ref, _ := a.save(t, s, save.Options{})
	bare, _ := b.save(t, s, save.Options{})
	if _, _, _, err := b.st.ChangeLabel(t.Context(), bare, func(l *store.Label) { l.Tags = []string{"golden"} }); err != nil {
		t.Fatal(err)
	}
	if err := b.fs.Remove("/store/vms/vm/00000001.flic"); err != nil {
		t.Fatal(err)
	}
	if _, r := a.ships(t, b, ref); r.Ref != bare {
		t.Errorf("%+v", r)
	}
	if l, err := b.st.Label(t.Context(), bare); err != nil || len(l.Tags) > 0 {
		t.Errorf("%+v, %v", l, err)
	}
}

// TestTransferNames: a checkpoint keeps its name and its UUID, what lies beside it comes
// along, and another name is as good.
func TestTransferNames(t *testing.T) {
	a, b := newLab(t, crashfs.New(0), "/"), newLab(t, crashfs.New(0), "/")
	s := small(1)
	ref, meta := a.save(t, s, smallOptions(t, s))
	if _, _, _, err := a.st.ChangeLabel(t.Context(), ref, func(l *store.Label) { *l = store.Label{Tags: []string{"x"}, Note: "n"} }); err != nil {
		t.Fatal(err)
	}
	learned := []workingset.PageRun{{Page: 1, Count: 2}}
	if err := a.st.AddTouched(t.Context(), ref, 4096, []string{"pc.ram", "rom"}, learned); err != nil {
		t.Fatal(err)
	}
	if _, r := a.ships(t, b, ref); r.Ref != ref || r.UUID != meta.UUID {
		t.Errorf("%+v", r)
	}
	b.holds(t, ref, s)
	if l, err := b.st.Label(t.Context(), ref); err != nil || l.Note != "n" || !slices.Equal(l.Tags, []string{"x"}) {
		t.Errorf("%+v, %v", l, err)
	}
	if tt, err := b.st.Touched(t.Context(), ref); err != nil || !slices.Equal(tt.Runs, learned) {
		t.Errorf("%+v, %v", tt, err)
	}
	d, err := b.st.Describe(t.Context(), ref)
	if err != nil || d.UUID != meta.UUID || d.NVRAM == nil || d.NVRAM.Path != "" || d.InNVRAM() {
		t.Errorf("%+v, %v", d.Identity, err)
	}
	// Again: it is there.
	if s, r := a.ships(t, b, ref); s.Bytes != 0 || !r.Already {
		t.Errorf("%+v, %+v", s, r)
	}
	all, _, err := a.sent(nil, ref)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := b.takes(all, store.Ref{}); err != nil || !got[0].Already {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := b.takes(all, store.Ref{VM: "else"}); err == nil {
		t.Error("one UUID was to have two names")
	}
	// Another one has the name.
	c := newLab(t, crashfs.New(0), "/")
	other, _ := c.save(t, grown(2), smallOptions(t, s))
	if _, err := c.takes(all, store.Ref{}); !errors.Is(err, store.ErrTaken) {
		t.Errorf("%v", err)
	}
	if got, err := c.takes(all, store.Ref{VM: "vm"}); err != nil || got[0].Ref != (store.Ref{VM: "vm", N: 2}) {
		t.Errorf("%+v, %v", got, err)
	}
	c.holds(t, store.Ref{VM: "vm", N: 2}, s)
	c.holds(t, other, grown(2))
	// A copy of a copy, under a third name; and numbers that nobody has had.
	e := newLab(t, crashfs.New(0), "/")
	b2, _, err := c.sent(nil, store.Ref{VM: "vm", N: 2})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := e.takes(b2, store.Ref{VM: "else", N: 7}); err != nil || got[0].Ref != (store.Ref{VM: "else", N: 7}) {
		t.Errorf("%+v, %v", got, err)
	}
	e.holds(t, store.Ref{VM: "else", N: 7}, s)
	// Removed there it can come again; and to have both is no harm.
	if err := e.remove(store.Ref{VM: "else", N: 7}); err != nil {
		t.Fatal(err)
	}
	if _, err := e.takes(b2, store.Ref{VM: "else", N: 7}); err != nil {
		t.Error(err)
	}
	e.holds(t, store.Ref{VM: "else", N: 7}, s)
	for _, l := range []*lab{a, b, c, e} {
		if rep, err := l.st.GC(t.Context()); err != nil || len(rep.Warnings) > 0 {
			t.Errorf("gc: %+v, %v", rep, err)
		}
		l.noLeaks(t)
	}
	e.holds(t, store.Ref{VM: "else", N: 7}, s)
	// A sender that believes more than is true is told so.
	have := transfer.NewHave()
	have.Whole[meta.UUID] = true
	none, _, err := a.sent(have, ref)
	if err != nil {
		t.Fatal(err)
	}
	f := newLab(t, crashfs.New(0), "/")
	if _, err := f.takes(none, store.Ref{}); !errors.Is(err, store.ErrLacks) {
		t.Errorf("%v", err)
	}
}

// TestTransferSource: a damaged source is refused where it is, with file and offset.
func TestTransferSource(t *testing.T) {
	d := newDamaged(t, tiny(tiertest.Options{Seed: 4}), image.LZ4)
	file := d.image()
	refused := 0
	for off := int64(128); off < d.size(t, file); off += 61 {
		back := d.flip(t, file, off, 2)
		b, _, err := d.sent(nil, d.ref)
		back()
		if err == nil {
			t.Fatalf("byte %d: sent with the damage, %d bytes", off, len(b))
		}
		refused++
		if !integrity.IsCorrupt(err) || !strings.Contains(err.Error(), file) {
			t.Errorf("byte %d: %v", off, err)
		}
	}
	if refused < 10 {
		t.Errorf("only %d were refused", refused)
	}
}

// TestTransferGroup copies groups, whose members refer to each other: all of the members come,
// and with the last the group. Wherever the stream is cut off there is no group, and what goes
// on from there makes it one. What can't become one is refused before a member is sent.
func TestTransferGroup(t *testing.T) {
	const n = 3
	var streams []*tiertest.Stream
	for i := range n {
		streams = append(streams, generation(tiertest.Options{Seed: 1, Blocks: []tiertest.Block{{Name: "pc.ram", Size: 1 << 20}}}, 1+i))
	}
	l := newLab(t, crashfs.New(0), "/")
	g := newGroup(t, l, n)
	refs, metas, errs := g.save(streams, func(i int) save.Options {
		o := save.Options{Parent: save.ParentNone, Share: save.ShareNone}
		if i == 1 {
			o.WorkingSet, o.NVRAMSize = hotSet(t, streams[i], every(3)), 16<<20
		}
		return o
	})
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	if metas[0].Report.Peers+metas[1].Report.Peers+metas[2].Report.Peers == 0 {
		t.Error("they have nothing in common")
	}
	send := func(from, to *lab) ([]byte, error) {
		t.Helper()
		var b bytes.Buffer
		w, err := transfer.NewWriter(&b)
		if err == nil {
			_, err = from.st.SendGroup(t.Context(), store.Ref{VM: "g"}, w, to.has(t), store.SendOptions{})
		}
		if err == nil {
			err = w.Close()
		}
		return b.Bytes(), err
	}
	groups := func(l *lab) (names []string) {
		t.Helper()
		list, err := l.st.Groups(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range list {
			names = append(names, fmt.Sprint(g.Ref(), g.Missing, g.Err))
		}
		return names
	}
	all := func(l *lab) {
		t.Helper()
		for i, r := range refs {
			l.holds(t, r, streams[i])
		}
	}
	whole := []string{"g@1 [] <nil>"}

	other := newLab(t, crashfs.New(0), "/")
	b, err := send(l, other)
	if err != nil {
		t.Fatal(err)
	}
	images := int64(0)
	for _, r := range refs {
		d, err := l.st.Describe(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		images += d.ImageBytes
	}
	// What one needs of another goes over once, and not with each of both.
	if int64(len(b)) > images*3/2 {
		t.Errorf("%d bytes of stream for %d of images", len(b), images)
	}
	for i := 1; i <= 3; i++ {
		part := len(b) * i / 4
		if _, err := other.takes(b[:part], store.Ref{}); !errors.Is(err, transfer.ErrTruncated) {
			t.Errorf("cut at %d of %d: %v", part, len(b), err)
		}
		if got := groups(other); len(got) > 0 {
			t.Errorf("cut at %d of %d: %v", part, len(b), got)
		}
		if b, err = send(l, other); err != nil {
			t.Fatal(err)
		}
	}
	got, err := other.takes(b, store.Ref{})
	if err != nil || len(got) != n+1 || !got[n].Group || got[n].Already || got[n].Members != n || got[n].Ref != (store.Ref{VM: "g", N: 1}) {
		t.Errorf("%+v, %v", got, err)
	}
	all(other)
	was, err := l.st.FindGroup(t.Context(), store.Ref{VM: "g"})
	if err != nil {
		t.Fatal(err)
	}
	if is, err := other.st.FindGroup(t.Context(), store.Ref{VM: "g"}); err != nil || is.UUID != was.UUID || is.Mode != was.Mode || !is.Created.Equal(was.Created) || !slices.Equal(is.Members, was.Members) {
		t.Errorf("%+v, %v; it was %+v", is, err, was)
	}
	// Again: it is there, and little goes over.
	if b, err = send(l, other); err != nil || len(b) > 20<<10 {
		t.Errorf("%d bytes are sent again, %v", len(b), err)
	}
	if got, err := other.takes(b, store.Ref{}); err != nil || !got[n].Already || !got[0].Already {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := other.takes(b, store.Ref{VM: "h"}); err == nil || !strings.Contains(err.Error(), "is in this store already, as g@1") {
		t.Error(err)
	}
	// Each store is its own; what was removed comes back.
	for _, r := range refs {
		if err := l.remove(r); err != nil {
			t.Fatal(err)
		}
	}
	all(other)
	if b, err = send(other, l); err != nil {
		t.Fatal(err)
	}
	if _, err := l.takes(b, store.Ref{}); err != nil {
		t.Fatal(err)
	}
	all(l)
	if got := groups(l); !slices.Equal(got, whole) {
		t.Errorf("%v came back", got)
	}

	// Another group, or another checkpoint, has the name.
	third := newLab(t, crashfs.New(0), "/")
	if _, _, errs := newGroup(t, third, n).save(streams, func(int) save.Options { return save.Options{Parent: save.ParentNone} }); errors.Join(errs...) != nil {
		t.Fatal(errs)
	}
	if b, err = send(l, third); err != nil {
		t.Fatal(err)
	}
	for as, want := range map[store.Ref]string{{}: "group g@1: ", {VM: "h"}: "checkpoint vm"} {
		if _, err := third.takes(b, as); !errors.Is(err, store.ErrTaken) || !strings.Contains(err.Error(), want) {
			t.Errorf("as %v: %v", as, err)
		}
	}
	for i := range n {
		if err := third.remove(store.Ref{VM: fmt.Sprint("vm", i), N: 1}); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := third.takes(b, store.Ref{VM: "g"}); err != nil || got[n].Ref.N != 2 {
		t.Errorf("%+v, %v", got, err)
	}
	all(third)
	// The group whose members were removed is none of those that have their numbers now.
	if got := groups(third); !slices.Equal(got, []string{"g@2 [] <nil>"}) {
		t.Errorf("%v", got)
	}
	of, err := third.st.GroupOf(t.Context())
	if err != nil || of[refs[0]] != (store.Ref{VM: "g", N: 2}) {
		t.Errorf("%v, %v", of, err)
	}
	// The same of one member, which was removed and is another's number now.
	fifth := newLab(t, crashfs.New(0), "/")
	if _, _, errs := newGroup(t, fifth, n).save(streams, func(int) save.Options { return save.Options{Parent: save.ParentNone, Share: save.ShareNone} }); errors.Join(errs...) != nil {
		t.Fatal(errs)
	}
	if err := fifth.remove(refs[2]); err != nil {
		t.Fatal(err)
	}
	l.ships(t, fifth, refs[2])
	g5, err := fifth.st.FindGroup(t.Context(), store.Ref{VM: "g"})
	if err != nil || !slices.Equal(g5.Missing, refs[2:3]) {
		t.Errorf("%+v, %v", g5, err)
	}
	members, err := fifth.st.MembersOf(t.Context(), g5.Group)
	for _, m := range members { // in the order in which they were saved
		if away := m.Ref == refs[2]; errors.Is(m.Err, store.ErrNotFound) != away || !away && m.Err != nil {
			t.Errorf("%+v", m)
		}
	}
	if err != nil || len(members) != n {
		t.Errorf("%d members, %v", len(members), err)
	}
	if b, err := send(fifth, newLab(t, crashfs.New(0), "/")); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	// One that was flattened is the same as before.
	if _, _, err := fifth.flatten(refs[1]); err != nil {
		t.Fatal(err)
	}
	if g5, err = fifth.st.FindGroup(t.Context(), store.Ref{VM: "g"}); err != nil || len(g5.Missing) != 1 {
		t.Errorf("%+v, %v", g5, err)
	}

	// What is none of its members comes amid it; and what lacks a member is not sent.
	h := &transfer.GroupHead{Name: "x", Number: 1, UUID: was.UUID, Members: []transfer.Member{{VM: "vm0", Number: 1, UUID: was.UUID}}}
	h.UUID[0]++
	var forged bytes.Buffer
	w, err := transfer.NewWriter(&forged)
	if err == nil {
		if err = w.Group(h); err == nil {
			_, err = l.st.Send(t.Context(), refs[0], w, transfer.NewHave(), store.SendOptions{})
		}
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	fourth := newLab(t, crashfs.New(0), "/")
	// What is said to be there is looked for.
	said := transfer.NewHave()
	said.Parts[metas[0].UUID] = transfer.Part{Segments: source.Below(1)}
	if b, _, err := l.sent(said, refs[0]); err != nil {
		t.Error(err)
	} else if _, err := fourth.takes(b, store.Ref{}); !errors.Is(err, store.ErrLacks) {
		t.Errorf("of what it does not have: %v", err)
	}
	if _, err := fourth.takes(forged.Bytes(), store.Ref{}); !errors.Is(err, transfer.ErrDamaged) || len(groups(fourth)) > 0 {
		t.Error(err)
	}
	if err := l.remove(refs[1]); err != nil {
		t.Fatal(err)
	}
	if b, err := send(l, newLab(t, crashfs.New(0), "/")); !errors.Is(err, store.ErrNotFound) || !strings.Contains(err.Error(), refs[1].String()) || len(b) > 100 {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	for _, l := range []*lab{l, other, third, fourth} {
		l.noLeaks(t)
	}
}
