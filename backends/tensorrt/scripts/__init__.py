"""Programs that go into an artifact and run on the device; they need TensorRT, NumPy and a driver, and nothing of optkit."""
