// Package tier holds the tests of what its engines do together: a stream saved,
// restored, damaged, cut off. The engines are save, restore and lazy: a migration
// stream becomes a checkpoint in two tiers, FLIC's hot pages raw in an NVRAM file and
// all else compressed in a flash image, and a checkpoint a stream again.
//
// docs/architecture.md has the rooms below tier and the two flows through them.
package tier
