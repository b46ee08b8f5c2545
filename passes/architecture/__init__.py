"""Search for the architecture: what of a trained module can be narrower, shallower or cheaper, and what it is worth."""
