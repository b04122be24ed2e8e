"""What a call can be given by trees, and what only `model.generate` decodes rightly."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from specfuse.hf.rope import length_dependent_rope
from specfuse.hf.windows import slots_of_causal_buffers, unmasked_window
from specfuse.model_check import Verdict, checked, long_prompt

TESTED = frozenset(
    {
        "EventGptForConditionalGeneration",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "VideoLlavaForConditionalGeneration",
    }
)
"""Classes whose tokens our own tests compare with `model.generate`; they are not checked at first use."""

TESTED_TEXT = frozenset({"llama", "mistral", "qwen2"})
"""Model types of the decoders inside them."""

_PER_TOKEN = frozenset({"input_ids", "attention_mask", "position_ids", "inputs_embeds"})
"""Inputs per token that passes over trees extend."""

_verdicts: dict[str, Verdict] = {}
_own_verdicts: weakref.WeakKeyDictionary[Any, dict[str, Verdict]] = weakref.WeakKeyDictionary()


class PlainOnly(ValueError):
    """A model, or a call, that only `model.generate` decodes rightly; the text says why.

    Attributes:
        prompt_length: P of the call.
    """

    prompt_length = 0


def require_support(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: GenerationConfig,
    inputs: Mapping[str, Any],
    max_nodes: int,
    check: bool,
) -> None:
    """Refuse a call that only `model.generate` decodes rightly.

    Args:
        input_ids: ``[B, P]``.
        config: the prepared generation config.
        inputs: the model's inputs besides ids, mask and cache.
        max_nodes: of a tree, 0 without a drafter.
        check: whether a model that our tests do not cover is checked.

    Raises:
        PlainOnly: says why.
    """
    embeds, positions = inputs.get("inputs_embeds"), inputs.get("position_ids")
    length = (input_ids if embeds is None else embeds).shape[1]
    if positions is not None and positions.numel():
        length = max(length, int(positions.max()) + 1)
    longest = length + config.max_length - input_ids.shape[1] + max_nodes
    try:
        _require_inference(model, longest)
        require_one_rope(model, longest)
        require_known_inputs(model, input_ids, inputs)
        if check:
            require_trees(model, longest)
    except PlainOnly as reason:
        reason.prompt_length = input_ids.shape[1]
        raise


def _require_inference(model: PreTrainedModel, longest: int) -> None:
    name = type(model).__name__
    if model.training and getattr(model, "is_gradient_checkpointing", False):
        raise PlainOnly(
            f"model {name} is in training mode with gradient checkpointing, which keeps no KV cache: call "
            "model.eval()"
        )
    slots = None if is_tested(model) else slots_of_causal_buffers(model)
    if slots is not None and longest > slots:
        raise PlainOnly(
            f"model {name}: its causal masks hold {slots} slots, and this call may take {longest}. Lower "
            "max_new_tokens or max_nodes, or use model.generate"
        )


def require_trees(model: PreTrainedModel, longest: int = 0) -> None:
    """Check a model of a class and configuration that was not met before.

    Args:
        longest: tokens that the call may reach: windows that it can cross are checked as well.

    Raises:
        PlainOnly: its trees give other logits than `model.generate`, or a window is too long to be checked.
    """
    if is_tested(model):
        return
    # What was changed on the object is that object's alone.
    verdicts = _own_verdicts.setdefault(model, {}) if _is_rewired(model) else _verdicts
    if model.training:
        raise PlainOnly(f"model {type(model).__name__} is in training mode; call model.eval()")
    window = unmasked_window(model)
    if window is not None and window < longest:
        raise PlainOnly(
            f"model {type(model).__name__}: its config has a window of {window} tokens that its masks do not "
            f"show, and this call may reach {longest}. Use model.generate"
        )
    try:
        key = _key(model, long_prompt(model, longest))
    except ValueError as unchecked:
        raise PlainOnly(f"model {type(model).__name__}: {unchecked}. Use model.generate") from None
    verdict = verdicts.get(key)
    if verdict is None:
        verdict, lasting = checked(model, longest, 0)
        if lasting:
            verdicts[key] = verdict
    if not verdict.trees:
        raise PlainOnly(
            f"model {type(model).__name__} (transformers {transformers.__version__}) does not support trees: "
            f"{verdict.reason}. Use model.generate, or specfuse.generate with drafter='auto', which falls "
            "back to it"
        )


def is_tested(model: PreTrainedModel) -> bool:
    """Return whether our own tests compare this class with `model.generate`, as it is configured here."""
    kind = type(model)
    known = kind.__name__ in TESTED and kind.__module__.startswith(("transformers.", "specfuse."))
    if not known or _is_rewired(model):
        return False
    config = model.config.get_text_config(decoder=True)
    # Lists of layer types and windows go together in a way of each class.
    given = getattr(config, "layer_types", None)
    mixed = given is not None and getattr(config, "sliding_window", None) and config.model_type != "qwen2"
    return config.model_type in TESTED_TEXT and not mixed and unmasked_window(model) is None


def _is_rewired(model: PreTrainedModel) -> bool:
    """Whether methods of the object were replaced, or PEFT has put layers of its own into it."""
    own = vars(model)
    forward = own.get("forward")
    patched = forward is None or not getattr(forward, "had_own_forward", True)
    if "prepare_inputs_for_generation" in own or not patched:
        return True
    # Without the library there are no such layers, and no need to look at every module.
    return "peft" in sys.modules and any(
        type(part).__module__.startswith("peft.") for part in model.modules()
    )


def require_known_inputs(model: PreTrainedModel, input_ids: Tensor, inputs: Mapping[str, Any]) -> None:
    """Refuse inputs with one entry per prompt token, which tree nodes would need as well.

    Args:
        input_ids: ``[B, P]``.
        inputs: the model's inputs besides ids, mask, cache and positions.

    Raises:
        PlainOnly: an integer or bool tensor ``[B, P, ...]`` (``token_type_ids``, ...), ``labels``, what an
            encoder has computed, or a PEFT adapter for each row.
    """
    embeds = inputs.get("inputs_embeds")
    length = (input_ids if embeds is None else embeds).shape[1]
    name_of_class = type(model).__name__
    for name, value in inputs.items():
        if value is not None and (name.startswith("encoder_") or name == "adapter_names"):
            raise PlainOnly(f"model {name_of_class}: {name} is not supported with trees; use model.generate")
        if name in _PER_TOKEN or not isinstance(value, Tensor) or name.startswith(("pixel_values", "event_")):
            continue
        whole = not value.is_floating_point() and value.dim() > 1 and value.shape[1] == length
        if whole or name in ("labels", "token_type_ids"):
            raise PlainOnly(
                f"model {name_of_class}: {name} {tuple(value.shape)} holds an entry per prompt token; "
                "draft trees would need one too, which is not supported: leave it out, or use model.generate"
            )


def require_one_rope(model: PreTrainedModel, longest: int) -> None:
    """Refuse calls in which rope frequencies change with the length of a pass.

    Args:
        longest: tokens of the prompt, the longest answer and the largest tree, or the highest position id and
            one, whatever is more.

    Raises:
        PlainOnly: a position may lie beyond the boundary at which a rope type changes its frequencies.
    """
    changes = length_dependent_rope(model.config.get_text_config(decoder=True))
    if changes is not None and longest > changes[1]:
        raise PlainOnly(
            f"model {type(model).__name__}: rope type {changes[0]!r} changes its frequencies beyond "
            f"{changes[1]} tokens, and this call may reach {longest}. Lower max_new_tokens or max_nodes, or "
            "use model.generate"
        )


def _key(model: PreTrainedModel, length: int) -> str:
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    adapters = {
        f"{type(m).__name__} {getattr(m, 'active_adapters', '')} {getattr(m, 'disable_adapters', '')}"
        for m in model.modules()
        if type(m).__module__.startswith("peft.")
    }
    owner = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    changed = (
        sorted(adapters),
        str(getattr(owner, "active_peft_config", "")),
        id(vars(model).get("forward")),
    )
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    return f"{name} {model.dtype} {implementation} {length} {config}{changed if _is_rewired(model) else ''}"
