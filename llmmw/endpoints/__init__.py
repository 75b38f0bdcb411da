"""Where calls go: the innermost handlers."""
