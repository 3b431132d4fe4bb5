package main

import (
	"encoding/json"
	"errors"
	"log/slog"
	"time"
)

// writeReportDoc writes a command's report where --report says.
func writeReportDoc(path string, doc any, log *slog.Logger) []byte {
	line, err := json.Marshal(doc)
	if err == nil && path != "" {
		err = writeReport(path, line)
	}
	if err != nil {
		log.Warn("the report was not written", "error", err)
	}
	return line
}

var errRecoverEager = usageError{errors.New("--recover goes on with a lazy restore: it does not go with --lazy never")}

var errRecoverWhich = usageError{errors.New("--recover needs the checkpoint that is being restored, NAME@N: the newest may be another, and QEMU can't tell one's pages from another's")}

// learnDefault: the background is not held back unless it is asked for.
const learnDefault = time.Duration(0)
