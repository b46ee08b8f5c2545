"""Harnesses that measure what the README claims."""
