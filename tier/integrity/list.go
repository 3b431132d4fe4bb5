package integrity

import (
	"bytes"
	"encoding/json"
	"fmt"
)

// DecodeList decodes a JSON array of at most so many elements, and stops at the first
// that is too many: {} is short, and what it stands for is not. For UnmarshalJSON.
func DecodeList[L ~[]T, T any](l *L, b []byte, most int) error {
	d := json.NewDecoder(bytes.NewReader(b))
	t, err := d.Token()
	if err != nil {
		return err
	}
	if *l = nil; t == nil {
		return nil // null
	}
	if t != json.Delim('[') {
		return fmt.Errorf("%v in place of a list", t)
	}
	for d.More() {
		if len(*l) == most {
			return fmt.Errorf("list of more than %d", most)
		}
		var v T
		if err := d.Decode(&v); err != nil {
			return err
		}
		*l = append(*l, v)
	}
	return nil
}
