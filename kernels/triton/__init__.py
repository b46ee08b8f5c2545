"""Kernels written in Triton: rules and programs here, what a GPU runs in ``device``, which alone needs Triton."""
