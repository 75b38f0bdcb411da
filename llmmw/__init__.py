"""llmmw: caching and pooling middleware for LLM calls."""

__version__ = "0.1.0"
