"""Same numbers, another spelling or another float type, as a target wants it."""
