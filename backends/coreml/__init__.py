"""Core ML. Nothing is imported here: coremltools takes seconds to load."""
