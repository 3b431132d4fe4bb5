package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// guest answers each line that comes on a socket. hold: it stays silent.
func guest(t *testing.T, answer func(line string) string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			in := bufio.NewReader(c)
			for {
				line, err := in.ReadString('\n')
				if err != nil {
					break
				}
				fmt.Fprint(c, answer(line))
			}
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return path
}

// synced answers guest-sync-delimited, with the rest of somebody else's answer before it.
func synced(line string) (string, bool) {
	var id int64
	if _, err := fmt.Sscanf(line, "\xff{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":%d}}", &id); err != nil {
		return "", false
	}
	return fmt.Sprintf("rn\": 7}\n\xff{\"return\": %d}\n", id), true
}

func TestSync(t *testing.T) {
	asked := 0
	path := guest(t, func(line string) string {
		if s, ok := synced(line); ok {
			return s
		}
		switch {
		case strings.Contains(line, `"guest-exec"`):
			if !strings.Contains(line, `{"path":"sync"}`) {
				t.Errorf("%s", line)
			}
			return `{"return": {"pid": 77}}` + "\n"
		case strings.Contains(line, `"guest-exec-status"`) && strings.Contains(line, "77"):
			if asked++; asked < 3 {
				return `{"return": {"exited": false}}` + "\n"
			}
			return `{"return": {"exited": true, "exitcode": 0}}` + "\n"
		}
		return `{"error": {"class": "CommandNotFound", "desc": "what?"}}` + "\n"
	})
	s, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := Sync(t.Context(), s); err != nil || asked != 3 {
		t.Errorf("%v after %d questions", err, asked)
	}
	if err := s.Execute(t.Context(), "guest-else", nil, nil); err == nil || !strings.Contains(err.Error(), "what?") {
		t.Error(err)
	}
}

// TestRun: a command goes to the guest with its arguments, and the time in nanoseconds, or if
// the agent can't set it by a command.
func TestRun(t *testing.T) {
	heard := make(chan string, 9)
	path := guest(t, func(line string) string {
		if s, ok := synced(line); ok {
			return s
		}
		heard <- strings.TrimSpace(line)
		switch {
		case strings.Contains(line, "status"):
			return `{"return": {"exited": true, "exitcode": 0}}` + "\n"
		case strings.Contains(line, `"time":1600000001`):
			return `{"error": {"class": "GenericError", "desc": "no hwclock"}}` + "\n"
		}
		return `{"return": {"pid": 5}}` + "\n"
	})
	s, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := Run(t.Context(), s, "sh", "-c", "a && b"); err != nil {
		t.Error(err)
	}
	for i := range int64(2) {
		if err := SetTime(t.Context(), s, time.Unix(1600000000+i, 5)); err != nil {
			t.Error(err)
		}
	}
	want := []string{
		`{"execute":"guest-exec","arguments":{"arg":["-c","a \u0026\u0026 b"],"path":"sh"}}`,
		`{"execute":"guest-exec-status","arguments":{"pid":5}}`,
		`{"execute":"guest-set-time","arguments":{"time":1600000000000000005}}`,
		`{"execute":"guest-set-time","arguments":{"time":1600000001000000005}}`,
		`{"execute":"guest-exec","arguments":{"arg":["-s","@1600000001"],"path":"date"}}`,
		`{"execute":"guest-exec-status","arguments":{"pid":5}}`,
	}
	var asked []string
	for len(heard) > 0 {
		asked = append(asked, <-heard)
	}
	if !slices.Equal(asked, want) {
		t.Errorf("the guest was asked\n%s", strings.Join(asked, "\n"))
	}
}

func TestSyncFails(t *testing.T) {
	for name, c := range map[string]struct {
		exec, status, want string
	}{
		"disabled": {`{"error": {"class": "CommandNotFound", "desc": "Command guest-exec has been disabled"}}`, "", "has been disabled"},
		"failed":   {`{"return": {"pid": 1}}`, `{"return": {"exited": true, "exitcode": 3}}`, "code 3"},
		"killed":   {`{"return": {"pid": 1}}`, `{"return": {"exited": true, "signal": 9}}`, "signal 9"},
		"unsaid":   {`{"return": {"pid": 1}}`, `{"return": {"exited": true}}`, "does not say"},
		"nonsense": {`{"return": `, "", "its answer"},
		"for ever": {`{"return": {"pid": 1}}`, `{"return": {"exited": false}}`, "deadline"},
		"silent":   {"", "", "deadline"},
		"too long": {strings.Repeat("x", maxLine+1), "", "buffer full"},
	} {
		t.Run(name, func(t *testing.T) {
			path := guest(t, func(line string) string {
				s, ok := synced(line)
				switch {
				case ok:
					return s
				case strings.Contains(line, "status"):
					return c.status + "\n"
				case c.exec == "":
					return ""
				}
				return c.exec + "\n"
			})
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			s, err := Dial(ctx, path)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if err := Sync(ctx, s); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v; want %q", err, c.want)
			}
		})
	}
	// Nobody is behind the serial port, or somebody who answers other questions.
	for _, answer := range []string{"", "\xff{\"return\": -1}\n"} {
		path := guest(t, func(string) string { return answer })
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		if _, err := Dial(ctx, path); err == nil || answer == "" && !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		cancel()
	}
	if _, err := Dial(t.Context(), filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("there is no socket")
	}
}
