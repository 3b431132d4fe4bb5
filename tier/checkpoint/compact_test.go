package checkpoint

import (
	"encoding/json"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"github.com/google/uuid"
)

// fill gives every field below v a value that is not zero, and fails for a kind that it
// does not know.
func fill(t *testing.T, v reflect.Value, n *int64) {
	t.Helper()
	*n++
	switch x := v.Addr().Interface().(type) {
	case *time.Time:
		*x = time.Date(2026, 1, 2, 3, 4, 5, int(*n), time.FixedZone("", 3600))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(t, v.Field(i), n)
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(t, v.Elem(), n)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 3, 3))
		for i := range v.Len() {
			fill(t, v.Index(i), n)
		}
	case reflect.Array:
		for i := range v.Len() {
			fill(t, v.Index(i), n)
		}
	case reflect.String:
		v.SetString("text" + string(rune('a'+*n%20)))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(*n % 30)
	case reflect.Uint64, reflect.Uint8:
		v.SetUint(uint64(*n % 200))
	default:
		t.Fatalf("a field of kind %v", v.Kind())
	}
}

// fullIdentity has a value in every field, also in those that come later.
func fullIdentity(t *testing.T) *Identity {
	t.Helper()
	var id Identity
	var n int64
	fill(t, reflect.ValueOf(&id).Elem(), &n)
	id.PageSize = 4096
	id.NVRAM.Bytes = int64(id.NVRAM.Slots) * 4096
	return &id
}

// TestCompact holds the compact form to the JSON one: no field may be missing in it.
func TestCompact(t *testing.T) {
	full := fullIdentity(t)
	plain := &Identity{VM: "web1", Number: 7, UUID: uuid.New(), Created: time.Now(), PageSize: 4096}
	for _, id := range []*Identity{full, plain} {
		b, err := id.AppendCompact([]byte("before"))
		if err != nil {
			t.Fatal(err)
		}
		got, err := ParseCompact(b[len("before"):])
		if err != nil {
			t.Fatal(err)
		}
		want, _ := json.Marshal(id)
		have, _ := json.Marshal(got)
		if string(have) != string(want) {
			t.Errorf("%s came back as %s", want, have)
		}
	}
}

// TestCompactDamage parses pieces, and what was changed in it.
func TestCompactDamage(t *testing.T) {
	b, err := fullIdentity(t).AppendCompact(nil)
	if err != nil {
		t.Fatal(err)
	}
	for n := range b {
		if _, err := ParseCompact(b[:n]); err == nil {
			t.Errorf("the first %d of %d bytes are an identity", n, len(b))
		}
	}
	if _, err := ParseCompact(append(b, 0)); err == nil {
		t.Error("one byte more is an identity")
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		c := append([]byte(nil), b...)
		for range 1 + rng.IntN(3) {
			c[rng.IntN(len(c))] = byte(rng.Uint32())
		}
		ParseCompact(c) // whatever it says, it comes back
	}
}
