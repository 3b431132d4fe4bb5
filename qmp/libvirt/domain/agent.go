package domain

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/digitalocean/go-libvirt"

	"github.com/flic-migrate/flic-migrate/qmp/agent"
)

// GuestAgent is the agent of a domain's guest, which libvirt holds.
type GuestAgent struct {
	c *client
	d libvirt.Domain
}

// DialAgent connects to a domain's guest agent. Whether there is one shows with the first
// command.
func DialAgent(ctx context.Context, uri, name string) (*GuestAgent, error) {
	c, err := open(ctx, uri)
	if err != nil {
		return nil, err
	}
	// A job is in nobody's way: an incoming migration is one.
	d, err := c.find(ctx, name)
	if err != nil {
		c.close()
		return nil, err
	}
	return &GuestAgent{c, d}, nil
}

// agentTime is how long libvirt waits for one answer of the agent's, in seconds.
const agentTime = 5

// Execute implements agent.Agent.
func (a *GuestAgent) Execute(ctx context.Context, command string, args, result any) error {
	line, err := agent.Command(command, args)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, (agentTime+5)*time.Second)
	defer cancel()
	answer, err := await(ctx, a.c, "guest agent", func() (libvirt.OptString, error) {
		return a.c.rpc.QEMUDomainAgentCommand(a.d, string(line), agentTime, 0)
	})
	if err != nil {
		return err
	}
	if len(answer) == 0 {
		return fmt.Errorf("guest agent: %s: no answer", command)
	}
	return agent.Answer([]byte(answer[0]), result)
}

// Await waits until libvirt has found the agent, or until ctx is done. libvirt looks for it
// only when a domain that is restored has all of its memory, though the guest runs before.
func (a *GuestAgent) Await(ctx context.Context) error {
	for {
		err := a.Execute(ctx, "guest-ping", nil, nil)
		var no libvirt.Error
		if err == nil || !errors.As(err, &no) || no.Code != uint32(libvirt.ErrAgentUnresponsive) {
			return err
		}
		select {
		case <-time.After(pollInterval):
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// Close ends the connection to libvirt.
func (a *GuestAgent) Close() error {
	a.c.close()
	return nil
}
