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

// TestTable has the form of FLIC's Tables II and III: T and N_ws by beta. The
// figures are worked out by hand from T = beta N / (r + alpha beta).
func TestTable(t *testing.T) {
	for _, vm := range []struct {
		name     string
		p        Params // without beta
		interval [3]float64
		pages    [3]int64
	}{
		// 1 GiB. beta N/r alone would be 20, 30, 40 s.
		{"idle", Params{Pages: 262144, Alpha: 100, Rate: 26214.4}, [3]float64{19.8485, 29.6606, 39.3988}, [3]int64{1985, 2966, 3940}},
		{"busy", Params{Pages: 262144, Alpha: 6553.6, Rate: 26214.4}, [3]float64{13.3333, 17.1429, 20}, [3]int64{87381, 112347, 131072}},
		// Writes as fast as flash reads: 2/3, 3/4 and 4/5 of memory are hot.
		{"torn", Params{Pages: 262144, Alpha: 26214.4, Rate: 26214.4}, [3]float64{6.6667, 7.5, 8}, [3]int64{174763, 196608, 209715}},
	} {
		for i, beta := range []float64{2, 3, 4} {
			vm.p.Beta = beta
			d, err := vm.p.Interval()
			n, err2 := vm.p.WorkingSet()
			if err != nil || err2 != nil || math.Abs(d.Seconds()-vm.interval[i]) > 1e-4 || n != vm.pages[i] {
				t.Errorf("%s, beta %v: T %v, N_ws %d, want %v and %d (%v)", vm.name, beta, d, n, vm.interval[i], vm.pages[i], err)
			}
		}
	}
}

// Watching for what is left, again and again, ends at the equation's solution for
// guests whose working set grows ever more slowly.
func TestLeft(t *testing.T) {
	for name, hot := range map[string]func(seconds float64) float64{
		"fresh pages all the time": func(s float64) float64 { return 2000 * s },
		"the same 5000 pages":      func(s float64) float64 { return 5000 * (1 - math.Exp(-s*3)) },
		"both":                     func(s float64) float64 { return 5000*(1-math.Exp(-s*3)) + 200*s },
		"nothing":                  func(float64) float64 { return 0 },
	} {
		p := Params{Pages: 131072, Beta: 3, Rate: 20000}
		watched, looks := time.Second, 0
		for ; looks < 100; looks++ {
			left, err := p.Left(watched, int64(hot(watched.Seconds())))
			if err != nil || left < 0 {
				t.Fatalf("%s: %v, %v", name, left, err)
			}
			if left < watched/100 {
				break
			}
			watched += left
		}
		want := p.Beta * (float64(p.Pages) - hot(watched.Seconds())) / p.Rate
		if got := watched.Seconds(); math.Abs(got-want) > want/40 || looks > 6 {
			t.Errorf("%s: %v s after %d looks, the equation's is %v", name, got, looks, want)
		}
	}
	p := Params{Pages: 1000, Beta: 1, Rate: 100}
	if left, err := p.Left(time.Minute, 10); err != nil || left != 0 {
		t.Errorf("watched for long enough: %v more, %v", left, err)
	}
	if _, err := p.Left(0, 10); err == nil {
		t.Error("alpha after no time")
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
