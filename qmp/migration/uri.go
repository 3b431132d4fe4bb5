package migration

import "strings"

// ExecURI has QEMU start a process. A shell in between could hold the pipe open
// when the process dies, hence the exec.
func ExecURI(args []string) string { return "exec:exec " + ShellWords(args) }

// ShellWords is a line that /bin/sh takes for these words.
func ShellWords(args []string) string {
	words := make([]string, len(args))
	for i, a := range args {
		words[i] = shellQuote(a)
	}
	return strings.Join(words, " ")
}

// shellQuote makes one word of s for /bin/sh.
func shellQuote(s string) string {
	plain := func(c rune) bool {
		return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("/._-@+=:,", c)
	}
	if s != "" && strings.IndexFunc(s, func(c rune) bool { return !plain(c) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
