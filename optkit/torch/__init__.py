"""optkit inside PyTorch: ``torch.compile(module, backend="optkit")``, and kernels as operators that torch can trace."""
