package nvram

import "github.com/google/uuid"

// OpenRegion is OpenSome of all extents.
func (f *File) OpenRegion(owner uuid.UUID, extents []uint32, pageSize int) (*Region, error) {
	return f.OpenSome(owner, extents, pageSize, nil)
}
