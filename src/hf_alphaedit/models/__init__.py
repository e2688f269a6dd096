"""Everything this package assumes about transformers and accelerate."""
