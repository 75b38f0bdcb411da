"""One module for each peer, with a `PEER` in it. Each imports its package where it is used, in the peer's process."""
