"""The paper: AlphaEdit's mathematics on plain tensors. Imports torch and nothing else."""
