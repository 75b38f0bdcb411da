"""Where answers are kept: in memory, on disk, and both in tiers. Entries in, entries out; nothing is executed."""
