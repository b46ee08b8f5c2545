"""Core AI, Apple's newer stack: experimental, as its packages are (beta)."""
