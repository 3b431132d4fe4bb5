package main

import (
	"encoding/json"
	"log/slog"
	"os"

	"github.com/flic-migrate/flic-migrate/tier/progress"
	"github.com/flic-migrate/flic-migrate/tier/vfs"
)

// status is what restore --status keeps in a file: who it is, how far it is and, by
// changing, that nothing holds it up.
type status struct {
	PID       int    `json:"pid"`
	Namespace string `json:"pid_namespace"`
	Pages     int64  `json:"pages"`
	PagesAll  int64  `json:"pages_all"`
	Beat      int64  `json:"beat"` // grows a few times a second
}

// statusFile is written anew each time, and nobody sees half of it.
type statusFile struct {
	path string
	log  *slog.Logger
	last status
}

// newStatusFile returns nil without a path. A status that can't be written is
// no reason not to restore.
func newStatusFile(path string, log *slog.Logger) *statusFile {
	if path == "" {
		return nil
	}
	s := &statusFile{path: path, log: log, last: status{PID: os.Getpid(), Namespace: pidNamespace()}}
	s.write()
	return s
}

// write gives up for good if it fails once, such as on what is no regular file.
func (s *statusFile) write() {
	b, err := json.Marshal(s.last)
	if err == nil {
		err = vfs.WriteFile(vfs.OS, s.path, vfs.Writing{NoSync: true}, vfs.Bytes(append(b, '\n')))
	}
	if err != nil {
		s.log.Warn("no status", "error", err)
		s.path = ""
	}
}

// progress keeps the file up to date.
func (s *statusFile) progress(p progress.State) {
	if s == nil || s.path == "" {
		return
	}
	s.last.Pages, s.last.PagesAll = p.Pages, p.PagesAll
	s.last.Beat++
	s.write()
}

// pidNamespace says among whose processes a PID counts; QEMU may be in a
// container.
func pidNamespace() string {
	name, _ := os.Readlink("/proc/self/ns/pid")
	return name
}
