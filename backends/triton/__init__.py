"""Triton: the fused kernels of a graph as machine code for GPUs."""
