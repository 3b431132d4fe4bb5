// Package timer computes for how long to watch which pages a guest dirties: the
// timer of FLIC, section III-B, equation (1).
package timer

import (
	"fmt"
	"math"
	"time"
)

// Params are equation (1)'s known quantities.
//
// The equation takes alpha for a constant. It is none: a guest that writes the
// same pages again and again adds ever fewer to its working set, so that what a
// short look gives is too high, and the interval from it too short. Left is for
// watching on until the two agree.
type Params struct {
	Pages int64   // N_total: pages of all RAM blocks
	Alpha float64 // pages a second that come into the working set
	Beta  float64 // safety factor on the time that flash takes
	Rate  float64 // r: pages a second read from flash
}

// equation1 is FLIC's equation (1): T, in seconds, in which the guest's working set
// grows to what it needs while flash gives back the rest, beta times over:
//
//	N_ws + N_non = N_total     N_ws = alpha T     T = beta N_non / r
//
// So N_ws stays below N_total, whatever alpha is.
func equation1(total, alpha, beta, r float64) (T float64) {
	return beta * total / (r + alpha*beta)
}

// Interval returns T of equation (1). Impossible parameters are an error.
func (p Params) Interval() (time.Duration, error) {
	finite := func(x float64) bool { return !math.IsNaN(x) && !math.IsInf(x, 0) }
	if p.Pages <= 0 || !finite(p.Alpha) || p.Alpha < 0 || !finite(p.Beta) || p.Beta <= 0 || !finite(p.Rate) || p.Rate <= 0 {
		return 0, fmt.Errorf("timer: no interval for %d pages, alpha %v and r %v pages a second, beta %v", p.Pages, p.Alpha, p.Rate, p.Beta)
	}
	seconds := equation1(float64(p.Pages), p.Alpha, p.Beta, p.Rate)
	if seconds > math.MaxInt64/float64(time.Second)/2 {
		return math.MaxInt64 / 2, nil
	}
	return time.Duration(seconds * float64(time.Second)), nil
}

// WorkingSet returns N_ws, the pages that are in the working set after T.
func (p Params) WorkingSet() (int64, error) {
	t, err := p.Interval()
	return int64(math.Round(p.Alpha * t.Seconds())), err
}

// Left returns for how much longer to watch a guest of whose pages hot have come
// into the working set in the time that it has been watched for, which is the
// alpha of this question. It is 0 when the time is what the equation asks for:
//
//	watched = beta (N_total - hot) / r
//
// As alpha falls T rises, so watching for what is left and asking again comes
// nearer to the solution from below.
func (p Params) Left(watched time.Duration, hot int64) (time.Duration, error) {
	if watched <= 0 {
		return 0, fmt.Errorf("timer: watched for %v", watched)
	}
	p.Alpha = float64(hot) / watched.Seconds()
	t, err := p.Interval()
	return max(0, t-watched), err
}
