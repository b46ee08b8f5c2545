"""PyTorch modules, exported programs and files of both become a graph, proved against eager execution."""
