"""The name under which transformers passes the KV cache.

Up to 5.23 it is ``past_key_values``, from 5.24 on ``cache``: as a forward argument, as an argument of
``model.generate``, among what a ``custom_generate`` is handed, and as a field of outputs. A deprecation shim
still takes the old name there, with a warning; outputs do not have it. So both are looked up in the signature
or class at hand, never by version number.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE_NAMES = ("cache", "past_key_values")
"""Every name the cache has had, newest first."""


def cache_field(output_class: type) -> str:
    """Return the name of the cache field of an output class.

    Raises:
        RuntimeError: the class has no field with a known name.
    """
    fields = {field.name for field in dataclasses.fields(output_class)}
    for name in CACHE_NAMES:
        if name in fields:
            return name
    raise RuntimeError(
        f"{output_class.__name__} of this transformers has none of the cache fields {CACHE_NAMES}; "
        "use a version that `specfuse doctor` lists as tested"
    )


GENERATE_CACHE = cache_field(GenerateDecoderOnlyOutput)
"""Argument of ``model.generate``, model input handed to a ``custom_generate``, and field of its output."""

OUTPUT_CACHE = cache_field(CausalLMOutputWithPast)
"""Field of a model's output, and preferred argument of a forward that takes several names."""


def cache_argument(forward: Callable[..., Any]) -> str:
    """Return the name of the argument by which ``forward`` takes the KV cache.

    A forward that only takes it among ``**kwargs`` is given transformers' present name.

    Raises:
        ValueError: ``forward`` takes no cache under any known name.
    """
    parameters = inspect.signature(forward).parameters
    for name in (OUTPUT_CACHE, *CACHE_NAMES):
        if name in parameters:
            return name
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return OUTPUT_CACHE
    owner = getattr(forward, "__self__", None)
    name = getattr(forward, "__qualname__", repr(forward)) if owner is None else type(owner).__name__
    raise ValueError(f"model {name} keeps no KV cache: its forward takes none of {', '.join(CACHE_NAMES)}")


def pop_cache(arguments: dict[str, Any]) -> Any:
    """Remove the cache from keyword arguments, whatever its name, and return it; None where there is none.

    Raises:
        ValueError: two different caches under two names.
    """
    given = [cache for name in CACHE_NAMES if (cache := arguments.pop(name, None)) is not None]
    if len(given) > 1 and given[0] is not given[1]:
        raise ValueError(f"{' and '.join(CACHE_NAMES)} name the same cache: pass one of them")
    return given[0] if given else None


def with_cache_name(arguments: Mapping[str, Any], name: str = GENERATE_CACHE) -> dict[str, Any]:
    """Return keyword arguments in which a cache, if there is one, has the given name."""
    renamed = dict(arguments)
    cache = pop_cache(renamed)
    return renamed if cache is None else {**renamed, name: cache}


def output_cache(output: Any) -> Any:
    """Return the KV cache in a model's output or in that of ``generate``; None where it holds none."""
    for name in CACHE_NAMES:
        cache = getattr(output, name, None)
        if cache is not None:
            return cache
    return None
