package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// sshServer is a real sshd on a port of the loopback, which lets its user in with a key.
type sshServer struct {
	dir string
	ssh string // the command that connects
	pid int
}

// startSSH starts one. As root it is given a view of the file system of its own, in which
// there is the user that sshd has for what it does not trust.
func startSSH(t *testing.T) *sshServer {
	t.Helper()
	script, err := filepath.Abs("../../scripts/sshd")
	ok(t, err)
	var why bytes.Buffer
	find := exec.Command(script)
	find.Stderr = &why
	out, err := find.Output()
	if err != nil {
		t.Fatalf("no sshd: %v: %s", err, why.String())
	}
	sshd := strings.TrimSpace(string(out))
	s := &sshServer{dir: t.TempDir()}
	for _, key := range []string{"host", "user"} {
		if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", s.path(key)).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen: %v: %s", err, out)
		}
	}
	_, port, err := net.SplitHostPort(freePort(t))
	ok(t, err)
	public, err := os.ReadFile(s.path("user.pub"))
	ok(t, err)
	ok(t, os.WriteFile(s.path("authorized"), public, 0o600))
	config := fmt.Sprintf("ListenAddress 127.0.0.1\nPort %s\nHostKey %s\nAuthorizedKeysFile %s\nPidFile none\nUsePAM no\n"+
		"StrictModes no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n", port, s.path("host"), s.path("authorized"))
	// Newer ones are made of several programs, which they look for where they are installed.
	for key, name := range map[string]string{"SshdSessionPath": "sshd-session", "SshdAuthPath": "sshd-auth"} {
		path := filepath.Join(filepath.Dir(sshd), "../lib/openssh", name)
		if _, err := os.Stat(path); err == nil {
			config += key + " " + path + "\n"
		}
	}
	ok(t, os.WriteFile(s.path("config"), []byte(config), 0o600))
	cmd := exec.Command(sshd, "-D", "-e", "-f", s.path("config"))
	if os.Geteuid() == 0 {
		ok(t, os.WriteFile(s.path("passwd"), append(readAll(t, "/etc/passwd"), "\nsshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n"...), 0o644))
		// A password that is locked keeps keys out, too.
		ok(t, os.WriteFile(s.path("shadow"), []byte("root:*:19000:0:99999:7:::\n"), 0o600))
		cmd = exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-ec",
			`mount --bind "$1/passwd" /etc/passwd; mount --bind "$1/shadow" /etc/shadow
			mount -t tmpfs -o mode=755 tmpfs /run; mkdir /run/sshd; shift; exec "$@"`,
			"-", s.dir, sshd, "-D", "-e", "-f", s.path("config"))
	}
	log, err := os.Create(s.path("log"))
	ok(t, err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	ok(t, cmd.Start())
	s.pid = cmd.Process.Pid
	t.Cleanup(func() {
		s.cut()
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("sshd says:\n%s", readAll(t, s.path("log")))
		}
	})
	u, err := user.Current()
	ok(t, err)
	s.ssh = fmt.Sprintf("ssh -F none -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=%s -o LogLevel=ERROR -i %s -p %s -l %s",
		s.path("known"), s.path("user"), port, u.Username)
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		c, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", port))
		if err == nil {
			c.Close()
			return s
		}
		if time.Now().After(end) {
			t.Fatalf("sshd does not listen: %v", err)
		}
	}
}

func (s *sshServer) path(name string) string { return filepath.Join(s.dir, name) }

func readAll(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	ok(t, err)
	return b
}

// cut kills all that the server has started: connections, and the commands in them.
func (s *sshServer) cut() {
	for _, pid := range descendants(s.pid) {
		syscall.Kill(pid, syscall.SIGKILL)
	}
}

// descendants are the processes that one has started, and those that these have.
func descendants(of int) (pids []int) {
	children := make(map[int][]int)
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		// The name before it can have spaces in it.
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		parent, _ := strconv.Atoi(f[1])
		children[parent] = append(children[parent], pid)
	}
	for next := []int{of}; len(next) > 0; next = next[1:] {
		pids = append(pids, children[next[0]]...)
		next = append(next, children[next[0]]...)
	}
	return pids
}

// received waits until what was received of an image, in a store, has come to so many bytes.
func received(t *testing.T, store string, least int64) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		names, _ := filepath.Glob(filepath.Join(store, "tmp/*.staged"))
		for _, name := range names {
			if fi, err := os.Stat(name); err == nil && fi.Size() >= least {
				return
			}
		}
	}
	t.Fatalf("%d bytes have not come", least)
}

// TestSSH copies checkpoints over a real ssh, whose server is killed in the middle, with
// copy and with send and receive. The other store is as before then, and the next copy goes on
// where it was.
func TestSSH(t *testing.T) {
	s := startSSH(t)
	dir := t.TempDir()
	here := filepath.Join(dir, "here")
	program, err := exec.LookPath("flic-migrate")
	ok(t, err)
	run := func(stdin io.Reader, args ...string) (stdout string, err error) {
		cmd := exec.Command(program, args...)
		var out, stderr bytes.Buffer
		cmd.Env = append(os.Environ(), "FLIC_CONFIG=/dev/null")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &stderr
		if err = cmd.Run(); err != nil {
			err = fmt.Errorf("%w: %s", err, stderr.String())
		}
		return out.String(), err
	}
	stream, err := exec.Command("mkstream", "-size", fmt.Sprint(96<<20)).Output()
	ok(t, err)
	if _, err := run(bytes.NewReader(stream), "save", "--quiet", "--store", here, "--vm", "web1", "--parent", "none"); err != nil {
		t.Fatal(err)
	}
	image, err := os.Stat(filepath.Join(here, "vms/web1/00000001.flic"))
	ok(t, err)
	if image.Size() < 8<<20 {
		t.Fatalf("an image of %d bytes is too small for this", image.Size())
	}
	// This ssh is given the beginning of the stream, and then nothing, and no end.
	const half = 4 << 20
	slow := filepath.Join(dir, "slow")
	ok(t, os.WriteFile(slow, []byte(fmt.Sprintf("#!/bin/bash\nexec %s \"$@\" < <(head -c %d; exec sleep 90 </dev/null 2>/dev/null)\n", s.ssh, half)), 0o755))
	listed := func(far string) string {
		out, err := run(nil, "list", "--json", "--store", far)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	for name, c := range map[string]struct {
		cut, whole func(far string) (string, error)
	}{
		"copy": {
			func(far string) (string, error) {
				return run(nil, "copy", "--quiet", "--store", here, "web1", "--to", "127.0.0.1:"+far, "--ssh", slow, "--remote-program", program)
			},
			func(far string) (string, error) {
				return run(nil, "copy", "--json", "--store", here, "web1", "--to", "127.0.0.1:"+far, "--ssh", s.ssh, "--remote-program", program)
			},
		},
		"send": {
			func(far string) (string, error) {
				out, err := exec.Command("bash", "-c", fmt.Sprintf("set -o pipefail; %s send --quiet --store %s web1 | %s 127.0.0.1 %s receive --quiet --store %s",
					program, here, slow, program, far)).CombinedOutput()
				return string(out), err
			},
			func(far string) (string, error) {
				cmd := exec.Command("bash", "-c", fmt.Sprintf("set -o pipefail; %[3]s 127.0.0.1 %[1]s receive --list --store %[4]s >%[5]s && %[1]s send --quiet --store %[2]s --have %[5]s web1 | %[3]s 127.0.0.1 %[1]s receive --json --store %[4]s",
					program, here, s.ssh, far, filepath.Join(dir, "have")))
				out, err := cmd.Output()
				return string(out), err
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			far := filepath.Join(dir, "far-"+name)
			ended := make(chan error, 1)
			go func() {
				_, err := c.cut(far)
				ended <- err
			}()
			received(t, far, half/2)
			s.cut()
			select {
			case err := <-ended:
				if err == nil {
					t.Fatal("its connection was cut, and it says nothing")
				}
				t.Logf("cut off: %v", err)
			case <-time.After(60 * time.Second):
				t.Fatal("its connection was cut, and it does not end")
			}
			if got := listed(far); got != "[]" {
				t.Errorf("the other store has %s", got)
			}
			out, err := c.whole(far)
			if err != nil {
				t.Fatal(err)
			}
			var entries []copiedEntry
			if err := json.Unmarshal([]byte(out), &entries); err != nil || len(entries) != 1 {
				t.Fatalf("%q: %v", out, err)
			}
			if e := entries[0]; e.Checkpoint != "web1@1" || e.Bytes == 0 || e.Bytes > image.Size()-half/2 {
				t.Errorf("of %d bytes %d had come before: %+v", image.Size(), half/2, e)
			}
			if _, err := run(nil, "verify", "--store", far, "web1"); err != nil {
				t.Error(err)
			}
			back, err := run(nil, "restore", "--quiet", "--store", far, "web1")
			want, werr := run(nil, "restore", "--quiet", "--store", here, "web1")
			if err := errors.Join(err, werr); err != nil || back != want {
				t.Errorf("%d bytes come back, %d are restored here: %v", len(back), len(want), err)
			}
		})
	}
	// What goes wrong there is said here, with its exit code.
	other := filepath.Join(dir, "far-copy")
	if _, err := run(nil, "copy", "--store", here, "web1", "--to", "127.0.0.1:"+other, "--as", "db1", "--ssh", s.ssh, "--remote-program", program); err == nil || !strings.Contains(err.Error(), "127.0.0.1: checkpoint web1@1 is in this store already") {
		t.Errorf("%v", err)
	}
	if _, err := run(nil, "copy", "--store", here, "web1", "--to", "127.0.0.1:"+other, "--ssh", s.ssh, "--remote-program", "/nosuch"); err == nil || !strings.Contains(err.Error(), "/nosuch on 127.0.0.1 has not answered") {
		t.Errorf("%v", err)
	}
}
