"""Models that no package ships as ONNX, built from the weights that it does ship."""
