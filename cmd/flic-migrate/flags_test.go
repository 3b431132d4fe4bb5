package main

import "testing"

func TestSize(t *testing.T) {
	for _, c := range []struct {
		in   string
		want int64 // -1: refused
		out  string
	}{
		{"0", 0, "0"},
		{"1", 1, "1"},
		{"4096", 4096, "4K"},
		{"4k", 4096, "4K"},
		{"1536K", 1536 << 10, "1536K"},
		{"1024M", 1 << 30, "1G"},
		{"3G", 3 << 30, "3G"},
		{"2T", 2 << 40, "2T"},
		{"4194304T", 1 << 62, "4194304T"},
		{"4194305T", -1, ""},
		{"9223372036854775807", -1, ""},
		{"9223372036854775808", -1, ""},
		{"-1", -1, ""},
		{"-1K", -1, ""},
		{"", -1, ""},
		{"K", -1, ""},
		{"1KB", -1, ""},
		{"1.5G", -1, ""},
		{"0x10", -1, ""},
		{"1 G", -1, ""},
		{"1P", -1, ""},
	} {
		s := size(42)
		err := s.Set(c.in)
		if (err != nil) != (c.want < 0) {
			t.Errorf("%q: error %v", c.in, err)
			continue
		}
		if err != nil {
			if s != 42 {
				t.Errorf("%q was refused and changed the value to %d", c.in, s)
			}
			continue
		}
		if int64(s) != c.want || s.String() != c.out {
			t.Errorf("%q is %d, %q; want %d, %q", c.in, s, s.String(), c.want, c.out)
		}
	}
}

func TestChoiceAndCount(t *testing.T) {
	c := choice{value: "a", choices: []string{"a", "b"}}
	if err := c.Set("c"); err == nil || c.value != "a" {
		t.Errorf("c was taken: %v, %v", c.value, err)
	}
	if err := c.Set("b"); err != nil || c.value != "b" {
		t.Errorf("b was not taken: %v, %v", c.value, err)
	}
	n := count{5, 1, 9}
	for _, bad := range []string{"0", "10", "", "x", "1.0", "99999999999999999999"} {
		if err := n.Set(bad); err == nil || n.n != 5 {
			t.Errorf("%q was taken: %d, %v", bad, n.n, err)
		}
	}
	if err := n.Set("9"); err != nil || n.n != 9 {
		t.Errorf("9 was not taken: %v, %v", n.n, err)
	}
}

func TestEnvName(t *testing.T) {
	for key, want := range map[string]string{"store": "FLIC_STORE", "nvram-size": "FLIC_NVRAM_SIZE", "rm-all": "FLIC_RM_ALL"} {
		if got := envName(key); got != want {
			t.Errorf("%s: %s, want %s", key, got, want)
		}
	}
}
