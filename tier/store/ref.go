package store

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
	"golang.org/x/text/unicode/norm"
)

// MaxNumber is the highest checkpoint number.
const MaxNumber = 99999999

// CheckVM tells whether name can be a VM's name: 1 to 128 bytes of printable UTF-8
// without '/' and '@', not starting with '.' or '-', and in Unicode's normal form
// NFC: names that look the same are the same.
func CheckVM(name string) error { return checkName("VM name", name) }

// checkName is CheckVM for what is called by the same rules.
func checkName(what, name string) error {
	why := ""
	switch {
	case name == "":
		why = "it is empty"
	case len(name) > 128:
		why = fmt.Sprintf("it has %d bytes, and 128 are the most", len(name))
	case !utf8.ValidString(name):
		why = "it is not UTF-8"
	case strings.ContainsAny(name, "/@"):
		why = "it has a / or @ in it"
	case name[0] == '.' || name[0] == '-':
		why = "it begins with . or -"
	case strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }):
		why = "it has a character in it that can't be printed"
	case !norm.NFC.IsNormalString(name):
		why = fmt.Sprintf("it is not in Unicode's normal form NFC, as %q is", norm.NFC.String(name))
	default:
		return nil
	}
	return fmt.Errorf("%s %q: %w: %s", what, name, ErrName, why)
}

// Ref names a checkpoint: the N-th of a VM; N = 0 means the newest.
type Ref struct {
	VM string
	N  int
}

func (r Ref) String() string {
	if r.N == 0 {
		return r.VM
	}
	return fmt.Sprintf("%s@%d", r.VM, r.N)
}

// ParseRef parses NAME[@N].
func ParseRef(s string) (Ref, error) { return parseRef("VM name", "checkpoint number", s) }

// ParseGroup parses the NAME[@N] of a group.
func ParseGroup(s string) (Ref, error) { return parseRef("group name", "group number", s) }

func parseRef(name, number, s string) (Ref, error) {
	vm, num, numbered := strings.Cut(s, "@")
	if err := checkName(name, vm); err != nil {
		return Ref{}, err
	}
	if !numbered {
		return Ref{VM: vm}, nil
	}
	n, err := strconv.Atoi(num)
	why := ""
	switch {
	case err != nil && !errors.Is(err, strconv.ErrRange):
		why = "it is no number"
	case err != nil || n < 1 || n > MaxNumber:
		why = fmt.Sprintf("numbers go from 1 to %d", MaxNumber)
	case strconv.Itoa(n) != num:
		why = fmt.Sprintf("it is written %d", n)
	default:
		return Ref{vm, n}, nil
	}
	return Ref{}, fmt.Errorf("%s %q: %w: %s", number, num, ErrName, why)
}

// The names in a store. What has another name is left alone; see Strays.
const (
	storeFile   = "store.json"
	lockName    = "lock"
	sharingFile = "sharing.json"
	tmpFolder   = "tmp"
	nvramFolder = "nvram"
	looseFolder = "loose"
	vmsFolder   = "vms"

	summaryFolder = "summaries"

	partSuffix = ".part" // of an image in the making
	newSuffix  = ".new"  // of a sealed object in the making
	rateSuffix = ".rate" // of a measurement

	stagedSuffix = ".staged" // of what was received of an image

	imageSuffix   = ".flic"
	removedSuffix = ".gone" // no longer than imageSuffix: see remove
	touchedSuffix = ".touched"
	labelSuffix   = ".label"
	movedSuffix   = ".moved"
	lentSuffix    = ".lent"
)

func vmFolder(vm string) string { return vmsFolder + "/" + vm }

// object is the name of one of a checkpoint's objects.
func (r Ref) object(suffix string) string { return vmFolder(r.VM) + "/" + numbered(r.N, suffix) }

// numbered is the same without the folder's name.
func numbered(n int, suffix string) string {
	if n < 0 || n > MaxNumber {
		return fmt.Sprintf("%0*d%s", numberLen, n, suffix) // of nothing that is there
	}
	b := make([]byte, numberLen, 64)
	for i := range b {
		b[numberLen-1-i] = '0' + byte(n%10)
		n /= 10
	}
	return string(append(b, suffix...))
}

// numberLen is how many digits a checkpoint's number has in names: those of MaxNumber.
const numberLen = 8

// parseNumber parses an object's name in a VM's folder, NNNNNNNN with a suffix.
func parseNumber(name string) (n int, suffix string, ok bool) {
	if len(name) <= numberLen || name[numberLen] != '.' {
		return 0, "", false
	}
	for _, c := range []byte(name[:numberLen]) {
		if c < '0' || c > '9' {
			return 0, "", false
		}
		n = 10*n + int(c-'0')
	}
	return n, name[numberLen:], n > 0
}

// keptObject is the name of an image that others need, and that another has replaced
// under its checkpoint's number.
func (r Ref) keptObject(id uuid.UUID) string { return r.object("." + id.String() + removedSuffix) }

// imageObjects are the names that a checkpoint's image with a UUID can have, in the order in
// which who looks for it does: it can go from the first to one of the others meanwhile.
func (r Ref) imageObjects(id uuid.UUID) []string {
	return []string{r.object(imageSuffix), r.object(removedSuffix), r.keptObject(id)}
}

// parseKept tells of a suffix whether it is one of keptObject's.
func parseKept(suffix string) (id uuid.UUID, ok bool) {
	if len(suffix) != 1+uuidLen+len(removedSuffix) || suffix[1+uuidLen:] != removedSuffix {
		return id, false
	}
	id, err := uuid.Parse(suffix[1 : 1+uuidLen])
	return id, err == nil && id.String() == suffix[1:1+uuidLen]
}

// movedName is a piece of what has been moved from NVRAM of an image: the k-th, from 1 on,
// of the one with a UUID, which is or was checkpoint n.
type movedName struct {
	n  int
	id uuid.UUID
	k  int
}

// maxPieces is how many pieces an image can have. Each has at least a quarter of what was
// in NVRAM then, or moved.MaxBytes.
const maxPieces = 1 << 12

func (m movedName) object(vm string) string {
	return Ref{vm, m.n}.object(fmt.Sprintf(".%v.%d%s", m.id, m.k, movedSuffix))
}

// parseMoved tells of a number and a suffix whether they are a movedName's.
func parseMoved(n int, suffix string) (m movedName, ok bool) {
	stem, ok := strings.CutSuffix(suffix, movedSuffix)
	if !ok || len(stem) < 1+uuidLen+2 || stem[1+uuidLen] != '.' {
		return m, false
	}
	id, err := uuid.Parse(stem[1 : 1+uuidLen])
	if err != nil {
		return m, false
	}
	k, err := strconv.Atoi(stem[1+uuidLen+1:])
	m = movedName{n, id, k}
	return m, err == nil && k >= 1 && k <= maxPieces && m.object("")[len(Ref{"", n}.object("")):] == suffix
}

// partName is the name of an image in the making. It says which number is taken,
// because nothing else does until it is committed.
func partName(r Ref, id uuid.UUID) string {
	return fmt.Sprintf("%s/%v.%v%s", tmpFolder, r, id, partSuffix)
}

const uuidLen = 36

// parseTmp tells what an object in tmp is: of an image in the making it returns the
// checkpoint and its UUID too.
func parseTmp(name string) (r Ref, id uuid.UUID, suffix string, ok bool) {
	dot := strings.LastIndexByte(name, '.')
	if dot < uuidLen {
		return r, id, "", false
	}
	stem, suffix := name[:dot], name[dot:]
	ref, num := stem[:len(stem)-uuidLen], stem[len(stem)-uuidLen:]
	id, err := uuid.Parse(num)
	if err != nil || id.String() != num {
		return r, id, "", false
	}
	switch suffix {
	case newSuffix, rateSuffix, stagedSuffix:
		return r, id, suffix, ref == ""
	case partSuffix:
		ref, ok := strings.CutSuffix(ref, ".")
		r, err := ParseRef(ref)
		return r, id, suffix, ok && err == nil && r.N > 0
	}
	return r, id, "", false
}
