package migration

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/qmp/qmptest"
)

// armedGuest is a QEMU that is armed, what was kept of it as another process reads it,
// and its settings before.
func armedGuest(t *testing.T) (x *simulated, kept Kept, was string) {
	t.Helper()
	x = simulate("running")
	x.onMigrate = func(*simulated) {}
	was = x.settings()
	err := Arm(t.Context(), x, ArmOptions{Open: x.open, Take: func(_ context.Context, s ArmedStream) error {
		b, err := json.Marshal(s.Kept)
		if err == nil {
			err = json.Unmarshal(b, &kept)
		}
		return err
	}})
	if err != nil {
		t.Fatal(err)
	}
	if x.run != "running" || x.status != StatusActive {
		t.Fatalf("armed: the guest is %s, the migration %s", x.run, x.status)
	}
	if x.parameters["max-bandwidth"] != float64(armedBandwidth) || x.parameters["downtime-limit"] != float64(1) ||
		x.parameters["avail-switchover-bandwidth"] != float64(0) || !x.capabilities["return-path"] || !x.capabilities["events"] || x.capabilities["xbzrle"] || x.capabilities["auto-converge"] {
		t.Errorf("armed: %s", x.settings())
	}
	return x, kept, was
}

// An armed checkpoint stops the guest, lets it run on, and leaves settings as they
// were before it was armed, whether it succeeds or not.
func TestCheckpointArmed(t *testing.T) {
	broken := errors.New("no space")
	for name, save := range map[string]func(x *simulated) error{
		"saved":       func(x *simulated) error { completes(x); return nil },
		"fails":       func(*simulated) error { return broken },
		"panics":      func(*simulated) error { panic(broken) },
		"QEMU fails":  func(x *simulated) error { x.ends(StatusFailed, "device X", "running"); return io.ErrUnexpectedEOF },
		"was stopped": func(x *simulated) error { completes(x); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			x, kept, was := armedGuest(t)
			run := "running"
			if name == "was stopped" {
				run = "paused"
				x.run = run
			}
			rep, err := CheckpointArmed(t.Context(), x, kept, CheckpointOptions{Save: func(_ context.Context, _ *os.File, before qmp.RunState) error {
				if before.Status != run || x.run != "paused" {
					t.Errorf("the guest is %s and was %s", x.run, before.Status)
				}
				if run == "running" && x.parameters["max-bandwidth"] != float64(stoppedBandwidth) {
					t.Error("nobody could tell who has stopped the guest")
				}
				return save(x)
			}})
			if saved := name == "saved" || name == "was stopped"; rep.Saved != saved || (err == nil) != saved {
				t.Errorf("%+v, %v", rep, err)
			}
			if name == "fails" && !errors.Is(err, broken) {
				t.Error(err)
			}
			if name == "saved" && rep.Downtime != 5*time.Millisecond {
				t.Errorf("downtime %v", rep.Downtime)
			}
			if run == "paused" {
				run = "postmigrate"
			}
			if x.run != run || x.settings() != was {
				t.Errorf("the guest is %s, settings were\n%s\nare\n%s", x.run, was, x.settings())
			}
		})
	}
}

// What an armed checkpoint asks of QEMU is asked once, and the guest, of which it can't be said
// who has stopped it, runs again.
func TestCheckpointArmedAsksLittle(t *testing.T) {
	x, kept, _ := armedGuest(t)
	n := len(x.asked)
	saves := func(context.Context, *os.File, qmp.RunState) error { completes(x); return nil }
	if _, err := CheckpointArmed(t.Context(), x, kept, CheckpointOptions{Save: saves}); err != nil {
		t.Fatal(err)
	}
	before := []string{"query-migrate-parameters", "query-migrate", "query-status", "migrate-set-parameters", "stop"}
	after := []string{"query-migrate", "query-status", "cont", "query-yank", "migrate-set-capabilities", "migrate-set-parameters", "query-status", "closefd"}
	asked := x.asked[n:]
	if m := len(asked) - len(after); m < len(before) || !slices.Equal(asked[:len(before)], before) || !slices.Equal(asked[m:], after) {
		t.Errorf("asked %v, want %v, some questions, and %v", asked, before, after)
	}

	x, kept, _ = armedGuest(t)
	x.refuse["migrate-set-parameters"] = "not now"
	rep, err := CheckpointArmed(t.Context(), x, kept, CheckpointOptions{Save: saves})
	if err == nil || !strings.Contains(err.Error(), "not now") || rep.Saved || x.run != "running" {
		t.Errorf("%v, %+v, the guest is %s", err, rep, x.run)
	}
}

// What can't be armed is as it was.
func TestArmFails(t *testing.T) {
	broken := errors.New("no space")
	for name, test := range map[string]struct {
		prepare func(*simulated)
		take    error
		want    error
	}{
		"nobody reads":  {func(*simulated) {}, broken, broken},
		"paused":        {func(s *simulated) { s.run = "paused" }, nil, ErrPausedGuest},
		"blocked":       {func(s *simulated) { s.blocked = []string{"nvme"} }, nil, ErrBlocked},
		"migrating":     {func(s *simulated) { s.status = StatusActive; s.stream, _ = os.Open(os.DevNull) }, nil, ErrMigrating},
		"armed already": {func(s *simulated) { s.status = StatusActive; s.parameters["max-bandwidth"] = armedBandwidth }, nil, ErrArmed},
	} {
		t.Run(name, func(t *testing.T) {
			x := simulate("running")
			x.onMigrate = func(*simulated) {}
			test.prepare(x)
			was, run := x.settings(), x.run
			err := Arm(t.Context(), x, ArmOptions{Open: x.open, Take: func(context.Context, ArmedStream) error { return test.take }})
			if !errors.Is(err, test.want) {
				t.Errorf("%v, want %v", err, test.want)
			}
			if x.settings() != was || x.run != run {
				t.Errorf("the guest is %s, settings were\n%s\nare\n%s", x.run, was, x.settings())
			}
		})
	}
	x := simulate("running")
	x.refuse["migrate"] = "no such device"
	was := x.settings()
	err := Arm(t.Context(), x, ArmOptions{Open: x.open})
	qmptest.Mention(t, err, "no such device")
	if x.settings() != was {
		t.Errorf("settings %s", x.settings())
	}
}

// A command that is asked to end while it arms leaves no file of its own open in QEMU.
func TestArmInterrupted(t *testing.T) {
	x := simulate("running")
	x.onMigrate = func(*simulated) {}
	was := x.settings()
	ctx, stop := context.WithCancel(t.Context())
	err := Arm(ctx, x, ArmOptions{Open: x.open, Take: func(ctx context.Context, _ ArmedStream) error {
		stop()
		<-ctx.Done()
		return context.Cause(ctx)
	}})
	if !errors.Is(err, context.Canceled) || x.settings() != was {
		t.Errorf("%v, settings %s", err, x.settings())
	}
	if !slices.Contains(x.sent, "closefd") {
		t.Errorf("QEMU was told %v", x.sent)
	}
}

// While a guest is armed nothing else begins a migration, and says why. It can be
// disarmed by who knows the settings, and by who does not.
func TestDisarm(t *testing.T) {
	x, kept, was := armedGuest(t)
	if _, err := Checkpoint(t.Context(), x, CheckpointOptions{Mode: ModeStop, Save: savesAll, Open: x.open}); !errors.Is(err, ErrArmed) {
		t.Errorf("checkpoint: %v", err)
	}
	if _, err := Track(t.Context(), x, TrackOptions{}); !errors.Is(err, ErrArmed) {
		t.Errorf("track: %v", err)
	}
	if err := Disarm(t.Context(), x, DisarmOptions{Kept: kept}); err != nil || x.status != StatusCancelled || x.settings() != was {
		t.Errorf("%v; the migration is %s, settings %s", err, x.status, x.settings())
	}
	if _, err := CheckpointArmed(t.Context(), x, kept, CheckpointOptions{}); !errors.Is(err, ErrNotArmed) {
		t.Errorf("not armed: %v", err)
	}

	// Somebody has cancelled it, and runs a migration of his own.
	x, kept, _ = armedGuest(t)
	x.ends(StatusCancelled, "", "running")
	x.status = StatusActive
	if err := Disarm(t.Context(), x, DisarmOptions{Kept: kept, Ended: true}); err != nil || x.status != StatusActive || x.parameters["max-bandwidth"] != float64(33<<20) {
		t.Errorf("%v; the migration is %s, settings %s", err, x.status, x.settings())
	}

	// Somebody has set max-bandwidth, which stays. Who holds the stream knows whose the migration is.
	for _, ended := range []bool{false, true} {
		x, kept, _ = armedGuest(t)
		x.parameters["max-bandwidth"] = float64(50 << 20)
		if err := Disarm(t.Context(), x, DisarmOptions{Kept: kept, Ended: ended}); err != nil || x.status != StatusActive || !x.capabilities["return-path"] {
			t.Errorf("%v; the migration is %s, settings %s", err, x.status, x.settings())
		}
		if ended {
			x.ends(StatusFailed, "broken pipe", "running")
		}
		if err := Disarm(t.Context(), x, DisarmOptions{Kept: kept, Ended: ended, Held: true}); err != nil || x.status.goesOn() ||
			x.parameters["max-bandwidth"] != float64(50<<20) || x.parameters["downtime-limit"] != float64(250) || x.capabilities["return-path"] {
			t.Errorf("%v; the migration is %s, settings %s", err, x.status, x.settings())
		}
	}

	// What a killed checkpoint has stopped runs again.
	x, kept, was = armedGuest(t)
	x.parameters["max-bandwidth"], x.run = float64(stoppedBandwidth), "paused"
	err := Disarm(t.Context(), x, DisarmOptions{Kept: kept})
	if err != nil || x.run != "running" || x.settings() != was {
		t.Errorf("%v; the guest is %s, settings %s", err, x.run, x.settings())
	}

	// Nobody knows any more how it was.
	x, _, _ = armedGuest(t)
	forgotten, err := Forgotten(t.Context(), x)
	if err != nil || forgotten == nil {
		t.Fatal(forgotten, err)
	}
	if err := Disarm(t.Context(), x, DisarmOptions{Kept: *forgotten}); err != nil || x.status != StatusCancelled ||
		x.parameters["max-bandwidth"] != float64(defaultBandwidth) || x.capabilities["return-path"] {
		t.Errorf("%v; the migration is %s, settings %s", err, x.status, x.settings())
	}
	if forgotten, err = Forgotten(t.Context(), simulate("running")); forgotten != nil || err != nil {
		t.Error(forgotten, err)
	}
}

// memoryDevices is a QEMU that has these, in JSON, or refuses to tell.
type memoryDevices string

func (memoryDevices) Events(context.Context) (<-chan qmp.Event, error) { return nil, nil }

func (m memoryDevices) Execute(_ context.Context, command string, _, result any) error {
	if m == "" {
		return &qmp.Error{Command: command, Class: "CommandNotFound"}
	}
	return json.Unmarshal([]byte(m), result)
}

func TestUnplugged(t *testing.T) {
	const mem = `{"type": "virtio-mem", "data": {"size": 3, "max-size": 10}}`
	const dimm = `{"type": "dimm", "data": {"size": 7, "slot": 1}}`
	for answer, want := range map[memoryDevices]uint64{
		"": 0, "[]": 0, "[" + dimm + "]": 0, "[" + mem + "," + dimm + "," + mem + "]": 14,
		`[{"type": "virtio-mem", "data": {"size": 11, "max-size": 10}}]`: 0,
	} {
		if n, err := Unplugged(t.Context(), answer); n != want || err != nil {
			t.Errorf("%s: %d, %v, want %d", answer, n, err, want)
		}
	}
}

// QEMU says how far it is with the first pass, also where it is not in it any more.
func TestQueryFirstPass(t *testing.T) {
	for _, test := range []struct {
		answer string
		want   FirstPass
		err    error
	}{
		{`{"status": "active", "ram": {"remaining": 8192, "page-size": 4096, "dirty-sync-count": 1, "mbps": 0}}`, FirstPass{1, 2, 256}, nil},
		// 100 MB/s are 24 pages in a millisecond.
		{`{"status": "active", "ram": {"remaining": 4096000, "page-size": 4096, "dirty-sync-count": 3, "mbps": 800}}`, FirstPass{3, 1000, 256 + 48}, nil},
		{`{"status": "active", "ram": {"remaining": 4096000, "page-size": 4096, "dirty-sync-count": 1, "mbps": -1}}`, FirstPass{1, 1000, 256}, nil},
		{`{"status": "device"}`, FirstPass{}, ErrOutrun},
		{`{"status": "pre-switchover"}`, FirstPass{}, ErrOutrun},
		{`{"status": "completed"}`, FirstPass{}, ErrOutrun},
		{`{"status": "cancelled"}`, FirstPass{}, ErrNotArmed},
		{`{"status": "failing"}`, FirstPass{}, ErrNotArmed},
		{`{}`, FirstPass{}, ErrNotArmed},
		{`{"status": "active"}`, FirstPass{}, ErrNotArmed},
		{`{"status": "active", "ram": {"remaining": 8192, "page-size": 0}}`, FirstPass{}, ErrNotArmed},
	} {
		p, err := QueryFirstPass(t.Context(), says(test.answer))
		if p != test.want || !errors.Is(err, test.err) {
			t.Errorf("%s: %+v, %v", test.answer, p, err)
		}
	}
}

// says answers each command with the same.
type says string

func (s says) Events(context.Context) (<-chan qmp.Event, error) { return nil, nil }

func (s says) Execute(_ context.Context, _ string, _, result any) error {
	return json.Unmarshal([]byte(s), result)
}

// A guest that QEMU has stopped to finish is let run by who disarms, who knows that it ran.
func TestDisarmOutrun(t *testing.T) {
	for _, ran := range []bool{true, false} {
		x, kept, was := armedGuest(t)
		x.ends(StatusCancelled, "", "finish-migrate")
		if err := Disarm(t.Context(), x, DisarmOptions{Kept: kept, Ran: ran}); err != nil || (x.run == "running") != ran || x.settings() != was {
			t.Errorf("%v; the guest is %s, settings %s", err, x.run, x.settings())
		}
	}
}

// What is armed is a stream that holds little, and can be made to hold more. While QEMU's end is
// open here it does not end with QEMU, which is told otherwise.
func TestOpenArmed(t *testing.T) {
	qemu := make(chan *os.File, 2)
	m := dial(t, qmptest.New(t, func(c *qmptest.Conn) {
		files := c.Files()
		qmptest.Negotiated(func(c *qmptest.Conn, cmd qmptest.Command) {
			if cmd.Execute == "getfd" {
				qemu <- files.Take()
			}
			c.Reply(cmd, `{}`)
		})(c)
	}), qmp.Options{})
	ch, err := OpenArmed(t.Context(), m, TwoWay)
	if err != nil {
		t.Fatal(err)
	}
	ours, err := ch.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	stream, lives := <-qemu, <-qemu
	if n := waiting(stream); n != ch.buffer || n > 2*armedSend {
		t.Errorf("%d bytes wait, and the channel says %d", n, ch.buffer)
	}
	if err := Widen(ch.theirs); err != nil {
		t.Fatal(err)
	}
	if n := waiting(stream); n < wideSend {
		t.Errorf("%d bytes wait when it is wide", n)
	}
	ends := func(f *os.File, limit time.Duration) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLRDHUP}}, int(limit.Milliseconds()))
		return n > 0 && err == nil
	}
	if ends(ch.lives, 0) {
		t.Error("QEMU lives, and is said to be gone")
	}
	stream.Close()
	lives.Close()
	if !ends(ch.lives, time.Minute) {
		t.Error("QEMU is gone, and is said to live")
	}
	if ends(ours, 10*time.Millisecond) {
		t.Error("the stream has ended though its other end is open")
	}
	ch.Discard(t.Context())
	if !ends(ours, time.Minute) {
		t.Error("the stream does not end")
	}
}
