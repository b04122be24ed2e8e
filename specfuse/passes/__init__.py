"""Passes of a Hugging Face model over token trees: cache, masks, positions, attention, CUDA graphs, rows."""
