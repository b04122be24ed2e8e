"""Arguments of the generation loop: what of ``model.generate`` can be honoured, stop strings, seeds."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

_REFUSED_ARGUMENTS = {
    "assistant_model": "pass drafter=specfuse.ModelDrafter(assistant_model)",
    "assistant_tokenizer": "drafters use the target's tokenizer",
    "custom_generate": "specfuse is itself a custom_generate",
    "negative_prompt_ids": "classifier-free guidance is not supported",
    "negative_prompt_attention_mask": "classifier-free guidance is not supported",
    "synced_gpus": "multi-process generation is not supported",
}

# Field of GenerationConfig -> (values that change nothing, why others are refused).
_REFUSED_FIELDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((None, 1), "beam search is not speculative"),
    "num_beam_groups": ((None, 1), "beam search is not speculative"),
    "constraints": ((None,), "constrained beam search is not supported"),
    "force_words_ids": ((None,), "constrained beam search is not supported"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search is not supported"),
    "dola_layers": ((None,), "DoLa decoding is not supported"),
    "guidance_scale": ((None, 1, 1.0), "classifier-free guidance runs the model a second time per token"),
    "prompt_lookup_num_tokens": ((None,), "pass drafter=specfuse.PromptLookupDrafter()"),
    "use_mtp": ((None, False), "multi-token-prediction heads are not supported"),
    "output_attentions": ((None, False), "attention maps of a tree pass are not those of single steps"),
    "output_hidden_states": ((None, False), "hidden states are not collected"),
    # The other names only choose where keys and values lie, which changes no token.
    "cache_implementation": (
        (None, "dynamic", "dynamic_full", "static", "hybrid", "sliding_window", "hybrid_chunked"),
        "keys and values stay on the device, unquantized: leave it out, or use model.generate",
    ),
}


def check_arguments(kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for keyword arguments of ``model.generate`` that can not be honoured."""
    for name, why in _REFUSED_ARGUMENTS.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{name}={_short(kwargs[name])} is not supported: {why}")
    # Refused before Hugging Face prepares for them: an offloaded cache, for one, needs a GPU to be made.
    for name in _REFUSED_FIELDS.keys() & kwargs.keys():
        _check_field(name, kwargs[name])


def check_config(config: GenerationConfig) -> None:
    """Raises ValueError for fields of the generation config that can not be honoured."""
    for name in _REFUSED_FIELDS:
        _check_field(name, getattr(config, name, None))
    if (config.num_return_sequences or 1) > 1 and not config.do_sample:
        raise ValueError(
            f"num_return_sequences={config.num_return_sequences} needs do_sample=True: "
            "greedy answers are all the same"
        )


def check_mask(mask: Tensor | None) -> None:
    """Raises ValueError for a mask whose last entry is 0: rows padded on the right.

    ``model.generate`` goes on after the padding, at positions that depend on the class.
    """
    if mask is None or mask.dim() != 2 or not mask.shape[1] or bool((mask[:, -1] != 0).all()):
        return
    rows = (mask[:, -1] == 0).nonzero()[:, 0].tolist()
    raise ValueError(
        f"attention_mask ends in 0 in rows {rows[:8]} (right padding), which is not supported: pad on the "
        "left, for example with tokenizer.padding_side = 'left'"
    )


def with_stop_strings(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Turns stop strings into a criterion: Hugging Face keeps the tokenizer from a custom decoding loop."""
    tokenizer = kwargs.pop("tokenizer", None)
    config = kwargs.get("generation_config") or model.generation_config
    stop_strings = kwargs.pop("stop_strings", None) or config.stop_strings
    if stop_strings is None:
        return kwargs
    if tokenizer is None:
        raise ValueError(f"stop_strings={stop_strings!r} needs the model's tokenizer: pass tokenizer=...")
    if config.stop_strings is not None:
        kwargs["generation_config"] = copy.deepcopy(config)
        kwargs["generation_config"].stop_strings = None
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(stop_strings=stop_strings, tokenizer=tokenizer))
    return {**kwargs, "stopping_criteria": criteria}


def without_stop_strings(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model like this one, sharing everything, whose generation config has no stop strings.

    ``generate`` takes them from the model's own config wherever the call's config has none.
    """
    if not isinstance(model, PreTrainedModel) or model.generation_config.stop_strings is None:
        return model
    host = copy.copy(model)
    host.generation_config = copy.deepcopy(model.generation_config)
    host.generation_config.stop_strings = None
    return host


def row_seeds(seed: int | Sequence[int] | Tensor | None, batch: int, do_sample: bool) -> Tensor:
    """``[B]`` int64 noise seeds from the ``seed`` argument; row b of an int s gets s + b."""
    if seed is None:
        if not do_sample:
            return torch.zeros(batch, dtype=torch.int64)
        seed = int(torch.randint(2**62, ()))
    if isinstance(seed, int):
        return torch.arange(batch, dtype=torch.int64) + seed
    try:
        seeds = torch.as_tensor(seed, dtype=torch.int64).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"seed must be an int or {batch} ints (one per row), got {seed!r}") from None
    if tuple(seeds.shape) != (batch,):
        raise ValueError(f"seed must be an int or {batch} ints (one per row), got shape {tuple(seeds.shape)}")
    return seeds


def _check_field(name: str, value: object) -> None:
    neutral, why = _REFUSED_FIELDS[name]
    if value not in neutral:
        raise ValueError(f"{name}={_short(value)} is not supported: {why}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__}(...)"
