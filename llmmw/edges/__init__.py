"""How callers come in: as a decorated function, a client, a transport under an SDK, or a wrapped SDK client."""
