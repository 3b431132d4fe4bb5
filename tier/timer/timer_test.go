package timer

import (
	"math"
	"testing"
	"time"
)

func TestInterval(t *testing.T) {
	for _, test := range []struct {
		Params
		want time.Duration
	}{
		// A guest that writes nothing needs all of flash, beta times.
		{Params{Pages: 1000, Beta: 1, Rate: 100}, 10 * time.Second},
		{Params{Pages: 1000, Beta: 3, Rate: 100}, 30 * time.Second},
		// 3*1000 / (100 + 50*3) = 12 s: 600 pages in, 400 out, 3*400/100 = 12.
		{Params{Pages: 1000, Alpha: 50, Beta: 3, Rate: 100}, 12 * time.Second},
		// 2*131072 / (65536 + 32768*2) = 2 s.
		{Params{Pages: 131072, Alpha: 32768, Beta: 2, Rate: 65536}, 2 * time.Second},
		// Longer than can be told.
		{Params{Pages: math.MaxInt64, Beta: 1e9, Rate: 1e-9}, math.MaxInt64 / 2},
	} {
		if got, err := test.Interval(); err != nil || got != test.want {
			t.Errorf("%+v: %v, %v, want %v", test.Params, got, err, test.want)
		}
	}
}

// The solution fulfils the three equations it comes from.
func TestIntervalSolves(t *testing.T) {
	last := time.Duration(0)
	for _, beta := range []float64{2, 3, 4} {
		p := Params{Pages: 262144, Alpha: 1700, Beta: beta, Rate: 25600}
		d, err := p.Interval()
		if err != nil {
			t.Fatal(err)
		}
		ws := p.Alpha * d.Seconds()
		if rest := float64(p.Pages) - ws; math.Abs(d.Seconds()-beta*rest/p.Rate) > 1e-6 || ws <= 0 || rest <= 0 {
			t.Errorf("beta %v: T %v, working set %.0f, rest %.0f", beta, d, ws, rest)
		}
		if d <= last {
			t.Errorf("beta %v: %v is no longer than with a smaller one", beta, d)
		}
		last = d
	}
}

func TestIntervalRefuses(t *testing.T) {
	good := Params{Pages: 1, Alpha: 1, Beta: 1, Rate: 1}
	for name, change := range map[string]func(*Params){
		"no pages":       func(p *Params) { p.Pages = 0 },
		"negative alpha": func(p *Params) { p.Alpha = -1 },
		"alpha unknown":  func(p *Params) { p.Alpha = math.NaN() },
		"beta 0":         func(p *Params) { p.Beta = 0 },
		"rate 0":         func(p *Params) { p.Rate = 0 },
		"rate infinite":  func(p *Params) { p.Rate = math.Inf(1) },
	} {
		p := good
		change(&p)
		if d, err := p.Interval(); err == nil {
			t.Errorf("%s: %v", name, d)
		}
	}
}
