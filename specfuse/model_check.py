"""Check of a model on itself: passes over trees must give the logits that `model.generate` gives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from specfuse.hf.rope import length_dependent_rope
from specfuse.hf.windows import ignores_window
from specfuse.passes.tree_forward import TreeForward
from specfuse.tree import TokenTree

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

_PER_TOKEN = frozenset({"input_ids", "attention_mask", "position_ids", "inputs_embeds"})
"""Inputs per token that passes over trees extend."""

_PROMPT, _NEW = 12, 5
_LONGEST = 1024
"""Tokens of a check's prompt, tokens decoded after it, and the longest prompt that a window may ask for."""

# Mean error of the logits over their standard deviation. An error of masks, positions or cache costs tenths.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}

_verdicts: dict[str, Verdict] = {}


class PlainOnly(ValueError):
    """A model, or a call, that only `model.generate` decodes rightly; the text says why."""


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        trees: whether passes over trees gave the logits of `model.generate`.
        reason: why not; empty where they did.
        error: largest mean error of a node's logits, over their standard deviation; NaN where none was had.
    """

    trees: bool
    reason: str = ""
    error: float = float("nan")


def check(model: PreTrainedModel, *, seed: int = 0) -> Verdict:
    """Run a model on short random prompts and compare passes over trees with `model.generate`.

    A prompt carries a first tree, its accepted path is compacted in the KV cache, and a second tree goes on
    from there. Where the config has a sliding window, another prompt is longer than it. The last
    prompts are a batch, one of them padded on the left.

    Args:
        model: a Hugging Face decoder-only model, in eval mode.
        seed: of the prompts.

    Returns:
        A verdict. It never raises for what the model does.

    Example:
        >>> specfuse.check(model)
        Verdict(trees=True, reason='', error=1.1e-07)
    """
    worst = 0.0
    with torch.no_grad():
        for length, pads in _prompts(model):
            where = f"a prompt of {length} tokens" if len(pads) == 1 else "a batch with left padding"
            try:
                error = _error(model, length, pads, seed)
            except Exception as failure:
                return Verdict(False, f"{where}: {type(failure).__name__}: {failure}")
            worst = max(worst, error)
            if not error <= _TOLERANCE.get(model.dtype, 0.1):
                return Verdict(
                    False, f"logits of a tree differ from those of model.generate after {where}", error
                )
    return Verdict(True, "", worst)


def require_trees(model: PreTrainedModel) -> None:
    """Check a model of a class and configuration that was not met before.

    Raises:
        PlainOnly: its trees give other logits than `model.generate`.
    """
    if is_tested(model):
        return
    key = _key(model)
    verdict = _verdicts.get(key)
    if verdict is None:
        verdict = _verdicts[key] = check(model)
    if not verdict.trees:
        raise PlainOnly(
            f"model {type(model).__name__} (transformers {transformers.__version__}) does not support trees: "
            f"{verdict.reason}. Use model.generate, or drafter='auto', which falls back to it"
        )


def is_tested(model: PreTrainedModel) -> bool:
    """Return whether our own tests compare this class with `model.generate`, as it is configured here."""
    ours = type(model).__module__.startswith(("transformers.", "specfuse."))
    # PEFT replaces this method on the instance: prompt and prefix tuning rewrite the inputs in it.
    rewired = "prepare_inputs_for_generation" in vars(model)
    return ours and type(model).__name__ in TESTED and not rewired and not ignores_window(model)


def require_known_inputs(model: PreTrainedModel, input_ids: Tensor, inputs: Mapping[str, Any]) -> None:
    """Refuse inputs with one entry per prompt token, which tree nodes would need as well.

    Args:
        input_ids: ``[B, P]``.
        inputs: the model's inputs besides ids, mask, cache and positions.

    Raises:
        PlainOnly: an integer or bool tensor ``[B, P, ...]`` (``token_type_ids``, ...), ``labels``, or what an
            encoder has computed.
    """
    for name, value in inputs.items():
        if name.startswith("encoder_") and value is not None:
            raise PlainOnly(
                f"model {type(model).__name__}: {name} is for cross-attention, which is not supported; use "
                "model.generate"
            )
        if name in _PER_TOKEN or not isinstance(value, Tensor) or name.startswith(("pixel_values", "event_")):
            continue
        whole = not value.is_floating_point() and value.dim() > 1 and value.shape[:2] == input_ids.shape
        if whole or name == "labels":
            raise PlainOnly(
                f"model {type(model).__name__}: {name} {tuple(value.shape)} holds an entry per prompt token; "
                "draft trees would need one too, which is not supported: leave it out, or use model.generate"
            )


def require_one_rope(model: PreTrainedModel, longest: int) -> None:
    """Refuse calls in which rope frequencies change with the length of a pass.

    Args:
        longest: tokens of the prompt, the longest answer and the largest tree.

    Raises:
        PlainOnly: a position may lie beyond the boundary at which a rope type changes its frequencies.
    """
    changes = length_dependent_rope(model.config.get_text_config(decoder=True))
    if changes is not None and longest > changes[1]:
        raise PlainOnly(
            f"model {type(model).__name__}: rope type {changes[0]!r} changes its frequencies beyond "
            f"{changes[1]} tokens, and this call may reach {longest}. Lower max_new_tokens or max_nodes, or use "
            "model.generate"
        )


def _key(model: PreTrainedModel) -> str:
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    owner = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    if owner is not None:
        config += f"{type(owner).__name__} {getattr(owner, 'active_peft_config', '')}"
    return f"{type(model).__module__}.{type(model).__qualname__} {model.dtype} {implementation} {config}"


def _prompts(model: PreTrainedModel) -> list[tuple[int, list[int]]]:
    """Length and left padding per row of each prompt."""
    config = model.config.get_text_config(decoder=True)
    windows = {getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_window")}
    most = getattr(config, "max_position_embeddings", None) or _LONGEST
    longer = {
        w + 3 for w in windows if isinstance(w, int) and w > 0 and w + 3 + 2 * _NEW <= min(most, _LONGEST)
    }
    alone = [(length, [0]) for length in (_PROMPT, *sorted(longer - {_PROMPT}))]
    return [*alone, (_PROMPT, [0, 3])]


def _error(model: PreTrainedModel, length: int, pads: list[int], seed: int) -> float:
    """Mean error of the worst node over the standard deviation of the logits."""
    ids = torch.cat([_prompt(model, length, seed + row) for row in range(len(pads))])
    mask = (torch.arange(length) >= torch.tensor(pads)[:, None]).long().to(model.device)
    # The model's own end-of-sequence ids would cut the comparison short.
    config = GenerationConfig(
        max_new_tokens=_NEW,
        min_new_tokens=_NEW,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    output: Any = model.generate(ids, attention_mask=mask, generation_config=config)
    said = output.sequences[:, length:].tolist()
    target = TreeForward(model, len(pads), length + 4 * _NEW)
    vocabulary = output.logits[0].shape[-1]
    first = _trees(ids[:, -1].tolist(), [row[:2] for row in said], vocabulary)
    found = target.prefill({"input_ids": ids}, mask if any(pads) else None, first)[:, [0, 2, 4]]
    path = torch.tensor([[0, 2, 4]] * len(pads), dtype=torch.int32, device=model.device)
    kept = [3] * len(pads)
    target.commit(path, torch.tensor(kept, dtype=torch.int32, device=model.device), kept)
    second = _trees([row[2] for row in said], [row[3:4] for row in said], vocabulary)
    # said[2] stands at position length + 2, padding not counted.
    again = target.forward_tree(second, torch.tensor([length + 2 - pad for pad in pads]))[:, [0, 2]]
    rows = torch.cat([found, again], dim=1).double().flatten(0, 1)
    reference = torch.stack(output.logits[:_NEW], dim=1).double().to(rows.device).flatten(0, 1)
    finite = reference.isfinite().all(dim=1)
    if any(pads) and not finite.all():
        return 0.0  # transformers computes NaN at padding there (eager attention in float64), at all layers
    seen = reference.isfinite().all(dim=0)
    difference = (rows - reference)[:, seen].abs().mean(dim=1)
    return float((difference / reference[:, seen].std(dim=1).clamp(min=1e-12)).max())


def _prompt(model: PreTrainedModel, length: int, seed: int) -> Tensor:
    """``[1, length]`` random ids; none stands for pixels or sound, or ends a text."""
    config = model.config.get_text_config(decoder=True)
    special: set[int] = set()
    for source in (model.config, config, model.generation_config):
        for name, value in vars(source).items():
            if name.endswith(("_id", "_index", "_ids")):
                special |= {v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)}
    usable = [token for token in range(min(config.vocab_size, 4096)) if token not in special]
    picks = torch.randint(len(usable), (length,), generator=torch.Generator().manual_seed(seed))
    return torch.tensor([[usable[i] for i in picks.tolist()]], device=model.device)


def _trees(roots: list[int], right: list[list[int]], vocabulary: int) -> TokenTree:
    """A wrong and a right child at every depth: node 2 d is the right one of depth d."""
    tokens, parents = [], []
    for root, path in zip(roots, right, strict=True):
        pairs = [[(token + 1) % vocabulary, token] for token in path]
        tokens.append([root, *(token for pair in pairs for token in pair)])
        parents.append([-1, *(2 * depth for depth in range(len(path)) for _ in range(2))])
    return TokenTree.from_parents(tokens, parents)
