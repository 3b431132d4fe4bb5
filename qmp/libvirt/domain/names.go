package domain

import (
	"context"
	"slices"

	"github.com/digitalocean/go-libvirt"
)

// Names lists the domains that libvirt knows, running or not, in order of their names.
func Names(ctx context.Context, uri string) (names []string, err error) {
	c, err := open(ctx, uri)
	if err != nil {
		return nil, err
	}
	defer c.close()
	list, err := ask(ctx, c, "list domains", func() ([]libvirt.Domain, error) {
		list, _, err := c.rpc.ConnectListAllDomains(1, 0)
		return list, err
	})
	if err != nil {
		return nil, err
	}
	for _, d := range list {
		names = append(names, d.Name)
	}
	slices.Sort(names)
	return names, nil
}
