"""Adapters by kind, and from directories."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers import AutoConfig, AutoModel

from specfuse.adapters.base import AdapterModel
from specfuse.adapters.drafts import CompressionDrafter, TokenAlignmentAdapter
from specfuse.adapters.modules import LightweightAdapter, LinearAdapter, ResidualMLPAdapter
from specfuse.adapters.tokens import CrossAttentionAligner, TokenExpander

KINDS: dict[str, type[AdapterModel]] = {
    "linear": LinearAdapter,
    "residual-mlp": ResidualMLPAdapter,
    "lightweight": LightweightAdapter,
    "cross-attention": CrossAttentionAligner,
    "expander": TokenExpander,
    "token-alignment": TokenAlignmentAdapter,
    "compression": CompressionDrafter,
}

# AutoModel.from_pretrained finds the class of a directory once this package is imported.
for _class in KINDS.values():
    AutoConfig.register(_class.config_class.model_type, _class.config_class, exist_ok=True)
    AutoModel.register(_class.config_class, _class, exist_ok=True)


def load_adapter(directory: str | os.PathLike[str]) -> AdapterModel:
    """Loads an adapter of any kind that ``save_pretrained`` wrote, in eval mode; nothing is fetched.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: it holds no adapter, or its files are broken or do not belong together.
    """
    path = Path(directory)
    if not path.is_dir():
        raise FileNotFoundError(2, "no such adapter directory", str(directory))
    try:
        model_type = json.loads((path / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{directory} is no adapter: config.json cannot be read: {error}") from None
    kinds = {made.config_class.model_type: made for made in KINDS.values()}
    if not isinstance(model_type, str) or model_type not in kinds:
        raise ValueError(f"{directory} holds a {model_type!r} model, which is no adapter of specfuse")
    try:
        adapter, info = kinds[model_type].from_pretrained(
            path, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{directory}: the adapter cannot be loaded: {text}") from error
    # from_pretrained draws missing weights at random and only warns.
    if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"]]):
        raise ValueError(f"{directory}: the weights do not fit the adapter: {wrong[0]}")
    return adapter.eval()


def kind_of(adapter: AdapterModel) -> str:
    """The name of an adapter's kind in ``KINDS``."""
    return next(kind for kind, made in KINDS.items() if type(adapter) is made)
