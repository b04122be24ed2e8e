"""Conventions of Hugging Face transformers that specfuse relies on, found in signatures and classes.

The rest of the package imports them from here; `tests/test_hf_conventions.py` refuses the names elsewhere.
"""
