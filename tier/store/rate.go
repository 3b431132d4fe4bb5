package store

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/google/uuid"

	"github.com/flic-migrate/flic-migrate/tier/image"
)

// Rate is how fast the store's file system reads: r of FLIC's equation (1).
type Rate struct {
	BytesPerSecond float64   `json:"bytes_per_second"`
	Measured       time.Time `json:"measured"`
}

const (
	rateFile = "flash-rate.json"
	// rateSample is large beside what a device answers from memory of its
	// own, and small beside a VM's checkpoint: flash wears out.
	rateSample = 32 << 20
	// rateTime ends the reading of a device on which the sample takes long.
	rateTime = 2 * time.Second
	// rateAge is how long a measurement counts: devices age and are replaced.
	rateAge = 30 * 24 * time.Hour
)

// FlashRate returns how fast the store is read, which it measures if it was not
// in the last month: it writes a file of 32 MiB, takes it out of the page cache
// and reads it in a segment's size. That takes a second or so.
func (s *Store) FlashRate(ctx context.Context) (Rate, error) {
	var r Rate
	// What is damaged is measured again.
	if err := s.readSealed(ctx, rateFile, "flash rate", maxSealed, &r); err == nil && r.BytesPerSecond > 0 && time.Since(r.Measured) < rateAge {
		return r, nil
	}
	r, err := s.measureRate(ctx)
	if err != nil {
		return r, fmt.Errorf("measure how fast %s is read: %w", s.root, err)
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return r, err
	}
	defer unlock()
	return r, s.writeSealed(ctx, rateFile, r)
}

func (s *Store) measureRate(ctx context.Context) (r Rate, err error) {
	tmp := tmpFolder + "/" + uuid.NewString() + rateSuffix
	f, err := s.createTmp(ctx, tmp)
	if err != nil {
		return r, err
	}
	defer func() {
		f.Close()
		if e := s.dir.Remove(ctx, tmp); err == nil {
			err = e
		}
	}()
	// Random, so that a file system that compresses stores it all.
	buf := make([]byte, image.DefaultCodec.DefaultSegment())
	random := rand.NewChaCha8([32]byte{1})
	for n := 0; n < rateSample && err == nil; n += len(buf) {
		if err = context.Cause(ctx); err == nil {
			random.Read(buf)
			_, err = f.Write(buf)
		}
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return r, err
	}
	if f, ok := f.(interface{ DropCache() }); ok {
		f.DropCache()
	}
	start := time.Now()
	read := 0
	for read < rateSample && time.Since(start) < rateTime {
		if err := context.Cause(ctx); err != nil {
			return r, err
		}
		n, err := f.ReadAt(buf, int64(read))
		if err != nil {
			return r, err
		}
		read += n
	}
	r.Measured = time.Now().UTC().Truncate(time.Second)
	// A clock too coarse for a store in memory must not make it infinite.
	r.BytesPerSecond = float64(read) / max(time.Since(start), time.Microsecond).Seconds()
	return r, nil
}
