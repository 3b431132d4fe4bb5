package image

// ReadSegment is FetchSegment, decoded.
func (w *Writer) ReadSegment(sr *SegmentReader, n uint32) (*Segment, error) {
	if err := w.FetchSegment(&sr.Stored, n); err != nil {
		return nil, err
	}
	return sr.Decode(&sr.Stored)
}
