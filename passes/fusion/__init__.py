"""Several nodes become one: batch normalization and affine steps into their neighbours, activations, norms."""
