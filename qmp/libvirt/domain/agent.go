package domain

import (
	"context"
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
	d, err := c.lookup(ctx, name)
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

// Close ends the connection to libvirt.
func (a *GuestAgent) Close() error {
	a.c.close()
	return nil
}
