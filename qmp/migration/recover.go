package migration

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/flic-migrate/flic-migrate/qmp"
	"github.com/flic-migrate/flic-migrate/tier/rescue"
)

// Recover goes on with a lazy restore whose server has died, and with whatever
// Resume had still to do. It needs a Monitor with OOB: QEMU's main loop may be
// waiting for the memory itself.
func Recover(ctx context.Context, m *qmp.Monitor, o ResumeOptions) (ResumeReport, error) {
	rep := ResumeReport{Lazy: true}
	start := time.Now()
	if err := o.checkMark(ctx, m); err != nil {
		return rep, err
	}
	o.recovering, o.loaded = true, true
	ctx, end := patient(ctx)
	defer end()
	err := o.goOn(ctx, m, start, &rep)
	return rep, o.regain(ctx, m, start, &rep, err)
}

// goOn recovers once, and has the guest run unless it was let run before.
func (o *ResumeOptions) goOn(ctx context.Context, m *qmp.Monitor, start time.Time, rep *ResumeReport) error {
	watched, stop := watchIncoming(ctx, m)
	defer stop()
	err := o.recoverPaused(watched, m)
	if err == nil && rep.Running == 0 {
		err = o.run(watched, m, start, rep)
	}
	if err == nil {
		err = o.finishResume(watched, m, start, rep)
	}
	return o.because(watched, err)
}

// regain recovers as long as Regain allows it. A later Recover might find nobody to
// talk to: when QEMU's main loop waits for a page, or for the lock of a vCPU that
// waits for one, a monitor that connects can't even negotiate, which is the main
// loop's work. The one of the Resume has, before.
func (o *ResumeOptions) regain(ctx context.Context, x qmp.Executor, start time.Time, rep *ResumeReport, err error) error {
	m, ok := x.(*qmp.Monitor)
	if !ok || !m.OOB() || o.Regain == nil {
		return err
	}
	for errors.Is(err, ErrServerDied) && ctx.Err() == nil && o.Regain() {
		err = o.goOn(ctx, m, start, rep)
	}
	return err
}

// RecoverTime is how long a new server may take to shake hands; it opens and checks
// the checkpoint before. One that is not ready by then must not begin any more:
// QEMU does not survive two (migration/migration.c, migration_ioc_process_incoming).
const RecoverTime = time.Minute

const (
	// recoverAnswer is how long QEMU may take to answer migrate-recover, for which it
	// needs neither its main loop nor memory.
	recoverAnswer = 30 * time.Second
	// goneEvery is the time between two looks whether the new server has ended.
	goneEvery = 50 * time.Millisecond
)

// recoverPaused starts a new server and waits until it has shaken hands. A
// server that dies before it has written anything, or connected, leaves QEMU as it
// was; one that dies in the middle of the handshake takes QEMU with it
// (migration/savevm.c, loadvm_process_command in postcopy-recover).
func (o *ResumeOptions) recoverPaused(ctx context.Context, m *qmp.Monitor) error {
	uri, begin := ExecURI(o.Command(RecoveringServer)), func() error { return nil }
	if o.Connect != nil && sandboxed(m) {
		path, err := besides(m)
		if err != nil {
			return err
		}
		defer os.Remove(path)
		uri, begin = "unix:"+path, func() error { return o.Connect(path) }
	}
	// Not asked before whether it is paused: it may not be able to answer.
	asked, cancel := context.WithTimeout(ctx, recoverAnswer)
	err := m.ExecuteOOB(asked, "migrate-recover", map[string]any{"uri": uri}, nil)
	cancel()
	var refused *qmp.Error
	if errors.As(err, &refused) {
		err = fmt.Errorf("%w: %w", ErrNotPaused, err)
	}
	if err != nil {
		return err
	}
	if err := begin(); err != nil {
		return err
	}
	giveUp := time.After(RecoverTime)
	for {
		gone, info, err := o.askMigration(ctx, m, giveUp)
		switch {
		case err != nil:
			return err
		case info.Status.recovered():
			return nil
		case info.Status.Ended():
			return &Error{Status: info.Status, Desc: info.ErrorDesc}
		case gone:
			return fmt.Errorf("%w (the new one too)", ErrServerDied)
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// askMigration asks how the migration is, and whether the new server had ended
// before. QEMU's main loop, which answers, may wait for memory until the new server
// is there: then that it has ended is all that there is to know, and QEMU is taken
// to be paused.
func (o *ResumeOptions) askMigration(ctx context.Context, m *qmp.Monitor, giveUp <-chan time.Time) (gone bool, info Info, err error) {
	isGone := func() bool { return o.Gone != nil && o.Gone() }
	gone = isGone()
	answered := make(chan error, 1)
	var answer Info
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		answered <- rescue.Call(func() (err error) {
			answer, err = Query(ctx, m)
			return err
		})
	}()
	tick := time.NewTicker(goneEvery)
	defer tick.Stop()
	var seen time.Time
	for {
		select {
		case err := <-answered:
			return gone, answer, err
		case <-giveUp:
			return false, info, fmt.Errorf("the new server did not begin within %v (see QEMU's output for its reason): %w", RecoverTime, ErrServerDied)
		case <-tick.C:
			// A main loop that is not held up answers within this time.
			if !isGone() {
				seen = time.Time{}
			} else if seen.IsZero() {
				seen = time.Now()
			} else if time.Since(seen) > time.Second {
				return true, Info{Status: StatusPostcopyPaused}, nil
			}
		}
	}
}

// besides is the path of a socket for QEMU to make, where it could make its monitor's.
func besides(m *qmp.Monitor) (string, error) {
	dir, err := filepath.Abs(filepath.Dir(m.SocketPath()))
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "flic-"+rand.Text()[:8])
	if len(path) > qmp.MaxSocketPath {
		return "", &qmp.OpError{Op: "migrate-recover", Addr: m.Address(), Err: errors.New("QEMU may start no processes, and the path of its monitor leaves no room for another socket beside it")}
	}
	return path, nil
}

// sandboxed tells whether QEMU has filters of its own for what it may call: with
// -sandbox spawn=deny a migration to or from exec: is the end of it.
func sandboxed(m *qmp.Monitor) bool {
	peer, known := m.Peer()
	// Those of a container are this process's, too.
	return known && peer.Pid > 0 && seccompFilters(strconv.Itoa(int(peer.Pid))) > seccompFilters("self")
}

// seccompFilters is how many filters a process has (proc(5)); 0 if it can't be known.
func seccompFilters(pid string) int {
	b, _ := os.ReadFile(filepath.Join("/proc", pid, "status"))
	_, after, _ := strings.Cut(string(b), "\nSeccomp_filters:")
	line, _, _ := strings.Cut(after, "\n")
	n, _ := strconv.Atoi(strings.TrimSpace(line))
	return n
}
