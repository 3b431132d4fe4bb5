// Package agent speaks with QEMU's guest agent (qemu-ga), a program in the guest behind
// a serial port: JSON as on a monitor. What it says is the guest's word, and whether it
// answers is up to the guest: every wait has a limit.
package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"time"
)

// Agent is a way to a guest's agent.
type Agent interface {
	// Execute runs one command. args is marshalled to its arguments (nil for none), and
	// what the agent returns is unmarshalled into result (nil to ignore it).
	Execute(ctx context.Context, command string, args, result any) error
}

// pollInterval is the pause between two looks at whether a program in the guest is done.
const pollInterval = 50 * time.Millisecond

// Sync makes the guest write to its disks what it has not written yet, and waits for
// that until ctx is done. The guest runs sync(1) (guest-exec). The agent's fsfreeze would
// do the same, but a guest whose freezer is killed stays frozen: so it is not used.
func Sync(ctx context.Context, a Agent) error {
	if err := Run(ctx, a, "sync"); err != nil {
		return fmt.Errorf("the guest's sync: %w", err)
	}
	return nil
}

// Run runs a program in the guest, without input and with its output thrown away, and waits
// until ctx is done for its end; it goes on in the guest if that comes later. A program that
// ends with another code than 0 is an error.
func Run(ctx context.Context, a Agent, path string, args ...string) error {
	exec := map[string]any{"path": path}
	if len(args) > 0 {
		exec["arg"] = args
	}
	var started struct {
		PID int64 `json:"pid"`
	}
	if err := a.Execute(ctx, "guest-exec", exec, &started); err != nil {
		return err
	}
	for {
		var s struct {
			Exited   bool `json:"exited"`
			ExitCode *int `json:"exitcode"` // nil if a signal ended it
			Signal   *int `json:"signal"`
		}
		if err := a.Execute(ctx, "guest-exec-status", map[string]any{"pid": started.PID}, &s); err != nil {
			return err
		}
		if s.Exited {
			switch {
			case s.Signal != nil:
				return fmt.Errorf("signal %d ended it", *s.Signal)
			case s.ExitCode == nil:
				return errors.New("it ended, and the agent does not say how")
			case *s.ExitCode != 0:
				return fmt.Errorf("it ended with code %d", *s.ExitCode)
			}
			return nil
		}
		select {
		case <-time.After(pollInterval):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// SetTime sets the guest's clock. The agent's own command also sets the hardware clock, and
// fails without a program for that (hwclock, which Debian 13 no longer installs by itself),
// so date(1) is the second way: to the second.
func SetTime(ctx context.Context, a Agent, now time.Time) error {
	err := a.Execute(ctx, "guest-set-time", map[string]any{"time": now.UnixNano()}, nil)
	if err == nil || ctx.Err() != nil {
		return err
	}
	if other := Run(ctx, a, "date", "-s", fmt.Sprintf("@%d", now.Unix())); other != nil {
		return fmt.Errorf("%w; date: %w", err, other)
	}
	return nil
}

// Socket is an agent at the Unix socket of its serial port's character device.
type Socket struct {
	conn net.Conn
	in   *bufio.Reader
}

// maxLine caps an answer, in bytes.
const maxLine = 64 << 10

// Dial connects to an agent's socket, which takes one client, and finds the place in its
// answers from which on they are ours: somebody may have gone away in the middle of one.
func Dial(ctx context.Context, path string) (*Socket, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	s := &Socket{conn, bufio.NewReaderSize(conn, maxLine)}
	id := rand.Int64N(1 << 31)
	var got int64
	// A byte that no JSON has ends whatever the agent has read so far, and stands before
	// its answer to this.
	err = s.talk(ctx, func() error {
		line := fmt.Appendf([]byte{0xff}, `{"execute":"guest-sync-delimited","arguments":{"id":%d}}`+"\n", id)
		if _, err := conn.Write(line); err != nil {
			return err
		}
		for skipped := 0; ; skipped++ {
			b, err := s.in.ReadByte()
			if err != nil {
				return err
			}
			if b == 0xff {
				break
			}
			if skipped > 16*maxLine {
				return errors.New("it does not answer, but talks")
			}
		}
		return s.answer(&got)
	})
	if err == nil && got != id {
		err = errors.New("it answers another question")
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("guest agent at %s: %w", path, err)
	}
	return s, nil
}

// talk runs fn, which ends with ctx.
func (s *Socket) talk(ctx context.Context, fn func() error) error {
	stop := context.AfterFunc(ctx, func() { s.conn.SetDeadline(time.Unix(1, 0)) })
	err := fn()
	if !stop() && err != nil {
		err = context.Cause(ctx)
	}
	return err
}

// Execute implements Agent.
func (s *Socket) Execute(ctx context.Context, command string, args, result any) error {
	line, err := Command(command, args)
	if err != nil {
		return err
	}
	err = s.talk(ctx, func() error {
		if _, err := s.conn.Write(append(line, '\n')); err != nil {
			return err
		}
		return s.answer(result)
	})
	if err != nil {
		err = fmt.Errorf("guest agent: %s: %w", command, err)
	}
	return err
}

func (s *Socket) answer(result any) error {
	line, err := s.in.ReadSlice('\n')
	if err != nil {
		return err
	}
	return Answer(line, result)
}

// Close ends the connection.
func (s *Socket) Close() error { return s.conn.Close() }

// Command is a command as the agent reads it.
func Command(command string, args any) ([]byte, error) {
	return json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
}

// Answer reads what the agent says to a command.
func Answer(line []byte, result any) error {
	var a struct {
		Return json.RawMessage `json:"return"`
		Error  *struct {
			Class string `json:"class"`
			Desc  string `json:"desc"`
		} `json:"error"`
	}
	if err := json.Unmarshal(bytes.TrimSpace(line), &a); err != nil {
		return fmt.Errorf("its answer: %w", err)
	}
	if a.Error != nil {
		return fmt.Errorf("refused: %.200s", a.Error.Desc)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(a.Return, result)
}
