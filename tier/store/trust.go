package store

import (
	"context"
	"errors"
	"io/fs"

	"github.com/flic-migrate/flic-migrate/tier/checkpoint"
	"github.com/flic-migrate/flic-migrate/tier/digest"
	"github.com/flic-migrate/flic-migrate/tier/integrity"
)

// A trust domain is VMs whose checkpoints may have pages in common. A guest that can find
// out whether a page of its own was there already, by how long its save takes or by how
// large it is, learns what others have in their memory: so who must not learn that of each
// other are in different domains, and these share nothing. Digests of each domain are made
// with a key of its own, and say nothing of pages in another.
//
//	share/DOMAIN/key.json   sealed {"algorithm":…,"key":…}

// DefaultDomain is the trust domain of VMs of which nothing else is said.
const DefaultDomain = "default"

// shareFolder has a folder for each trust domain.
const shareFolder = "share"

const keyName = "key.json"

// CheckDomain tells whether name can be a trust domain's: by the rules for a VM's name.
func CheckDomain(name string) error { return checkName("trust domain", name) }

func domainFolder(domain string) string { return shareFolder + "/" + domain }

func domainKey(domain string) string { return domainFolder(domain) + "/" + keyName }

// domainDoc is the content of a domain's key.json.
type domainDoc struct {
	Algorithm digest.Algorithm `json:"algorithm"`
	Key       digest.Key       `json:"key"`
}

// DomainOf is the trust domain that a VM's newest checkpoint is in: empty if that is in
// none, as those of earlier versions are, and DefaultDomain if there is no checkpoint. One
// that can't say so has no say.
func (s *Store) DomainOf(ctx context.Context, vm string) (string, error) {
	o, err := s.objects(ctx, vm)
	if err != nil {
		return "", err
	}
	for i := len(o.images) - 1; i >= 0; i-- {
		id, _, err := s.identity(ctx, Ref{vm, o.images[i]})
		switch {
		case err == nil:
			return id.TrustDomain, nil
		case !gone(err) && !cannotTell(err) && !errors.Is(err, errNotObject):
			return "", err
		}
	}
	return DefaultDomain, nil
}

// Trust is what makes the digests of a trust domain. Its key is made when it is first asked
// for; one that is lost is found in the domain's checkpoints.
func (s *Store) Trust(ctx context.Context, domain string) (*digest.Hasher, error) {
	if err := CheckDomain(domain); err != nil {
		return nil, err
	}
	h, err := s.readDomain(ctx, domain)
	if err == nil || !gone(err) && !integrity.IsCorrupt(err) {
		return h, err
	}
	// Reading many images is nothing to hold the store lock for.
	if h, err = s.keyOf(ctx, domain); err != nil {
		return nil, err
	}
	if err := s.dir.Mkdir(ctx, domainFolder(domain)); err != nil {
		return nil, err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	// Another process may have been first.
	if now, err := s.readDomain(ctx, domain); err == nil {
		return now, nil
	}
	return h, s.writeDomain(ctx, domain, h)
}

// writeDomain writes a domain's key. The caller holds the store lock.
func (s *Store) writeDomain(ctx context.Context, domain string, h *digest.Hasher) error {
	return s.writeSealed(ctx, domainKey(domain), domainDoc{h.Algorithm(), h.Key()})
}

func (s *Store) readDomain(ctx context.Context, domain string) (*digest.Hasher, error) {
	var doc domainDoc
	if err := s.readSealed(ctx, domainKey(domain), "key of a trust domain", maxSealed, &doc); err != nil {
		return nil, err
	}
	return digest.New(doc.Algorithm, doc.Key)
}

// keyOf is the key that a domain has had, or else a new one. The default domain has that of
// the indexes of disk images, so that one digest of a page serves both.
func (s *Store) keyOf(ctx context.Context, domain string) (*digest.Hasher, error) {
	var newest *checkpoint.Identity
	list, err := s.Identities(ctx, "")
	if err != nil {
		return nil, err
	}
	for _, l := range list {
		if id := l.Identity; id != nil && id.TrustDomain == domain && id.Digests != nil &&
			(newest == nil || id.Created.After(newest.Created)) {
			newest = id
		}
	}
	if newest != nil {
		if h, err := newest.Digests.Hasher(); err == nil {
			return h, nil
		}
	}
	if domain == DefaultDomain {
		c, err := s.Disks()
		if err != nil {
			return nil, err
		}
		h, err := c.Hasher(ctx)
		if err == nil || !errors.Is(err, fs.ErrNotExist) && !integrity.IsCorrupt(err) {
			return h, err
		}
	}
	return digest.Fresh(), nil
}
