"""Change facts in a language model, with AlphaEdit, and keep a plain transformers checkpoint."""

__version__ = "0.1.0"
