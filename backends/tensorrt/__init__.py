"""TensorRT and TensorRT-RTX. Nothing is imported here: the process that builds loads this folder without the rest of optkit."""
