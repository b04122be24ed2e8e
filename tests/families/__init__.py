"""Small random models of every generative class of transformers, compared with ``model.generate``."""
