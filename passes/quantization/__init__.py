"""Fewer bits: static and dynamic quantization."""
