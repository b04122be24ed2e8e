"""How many layers of a decoder own keys and values: the others read those of an earlier layer."""

from __future__ import annotations

from typing import Any


def layers_with_kv(config: Any) -> int:
    """Return the number of decoder layers that write to the KV cache.

    Args:
        config: a decoder's text config. Its last ``num_kv_shared_layers`` layers (Gemma 3n, Gemma 4) own no
            keys and values; ``transformers.DynamicCache`` has no layers for them either.
    """
    return config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
