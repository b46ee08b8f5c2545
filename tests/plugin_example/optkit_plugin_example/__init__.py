"""A pass for optkit from another distribution."""
