"""Check of a model on itself: passes over trees must give the logits that `model.generate` gives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from specfuse.hf.rope import length_dependent_rope
from specfuse.passes.out_of_memory import is_out_of_memory
from specfuse.passes.tree_forward import TreeForward
from specfuse.tree import TokenTree

_PROMPT, _NEW = 12, 5
_LONGEST = 8192
"""Tokens of a check's prompt, tokens decoded after it, and the longest prompt that a window may ask for."""

_WINDOW = re.compile("window|chunk|local|block|topk")
"""Names of config fields that may bound how far attention sees; others do no harm."""

# Mean error of the logits over their standard deviation. An error of masks, positions or cache costs tenths.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}


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
    config = model.config.get_text_config(decoder=True)
    return checked(model, getattr(config, "max_position_embeddings", None) or _LONGEST, seed)[0]


def checked(model: PreTrainedModel, longest: int, seed: int) -> tuple[Verdict, bool]:
    """A verdict, and whether it holds for later calls too."""
    if model.training:
        return Verdict(False, "it is in training mode; call model.eval()"), False
    try:
        length = long_prompt(model, longest)
    except ValueError as fault:
        return Verdict(False, str(fault)), True
    prompts = [(_PROMPT, [0]), (_PROMPT, [0, 3])] + ([(length, [0])] if length else [])
    worst = 0.0
    with torch.no_grad():
        for length, pads in prompts:
            where = f"a prompt of {length} tokens" if len(pads) == 1 else "a batch with left padding"
            try:
                error = _error(model, length, pads, seed)
            except Exception as failure:
                reason = f"{where}: {type(failure).__name__}: {failure}"
                return Verdict(False, reason), not is_out_of_memory(failure)
            worst = max(worst, error)
            if not error <= _TOLERANCE.get(model.dtype, 0.05):
                reason = f"logits of a tree differ from those of model.generate after {where}"
                return Verdict(False, reason, error), True
    return Verdict(True, "", worst), True


def long_prompt(model: PreTrainedModel, longest: int) -> int:
    """Tokens of a prompt beyond every window that a call of ``longest`` tokens can cross; 0 for none.

    Raises:
        ValueError: the config leaves no room for such a prompt, or it would be too long.
    """
    config = model.config.get_text_config(decoder=True)
    sizes: set[Any] = set()
    for name, value in vars(config).items():
        if _WINDOW.search(name):
            sizes |= {part for part in (value if isinstance(value, list) else [value]) if type(part) is int}
    crossed = [size for size in sizes if 1 < size < longest]
    if not crossed:
        return 0
    window, rope = max(crossed), length_dependent_rope(config)
    most = min(getattr(config, "max_position_embeddings", None) or _LONGEST, _LONGEST)
    most = (most if rope is None else min(most, rope[1])) - 2 * _NEW
    if window + 3 > most:
        raise ValueError(
            f"a window of {window} tokens can not be checked with prompts of at most {most}, and this call "
            f"may reach {longest}"
        )
    # Far beyond it: half precision hides the loss of a few tokens.
    return min(2 * window + 3, most)


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
