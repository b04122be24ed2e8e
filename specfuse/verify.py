"""From the logits of one target pass over a tree to the accepted path.

How a token is chosen at a node is a ``TokenChoice``: temperature, top-k, top-p and min-p go into the fused
``verify_tree`` op; any other Hugging Face logits processor runs per visited node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specfuse.ops.verify_tree import AcceptedPath
from specfuse.tree import TokenTree

_verify_tree = torch.ops.specfuse.verify_tree.default

# The order in which verify_tree applies its filters, which is the order Hugging Face builds them in.
_FUSED = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


class Verified(NamedTuple):
    """What one pass decided."""

    accepted: AcceptedPath
    scores: list[list[Tensor]] | None  # per row, the processed scores [V] behind each emitted token
    logits: list[list[Tensor]] | None  # per row, the raw logits [V] behind each emitted token


@dataclass
class TokenChoice:
    """How the target picks a token at each node.

    Args:
        processors: logits processors that run per visited node, in order; None when everything is fused.
        temperature: 0 for greedy.
        top_k, top_p, min_p: filters of the fused op (0, 1.0 and 0.0 switch them off).
        seeds: ``[B]`` int64, one noise stream per row.
        keep_scores, keep_logits: collect what ``output_scores`` / ``output_logits`` ask for.
    """

    processors: LogitsProcessorList | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seeds: Tensor
    keep_scores: bool = False
    keep_logits: bool = False

    def __post_init__(self) -> None:
        # One value per row, on the device, made once: a step only hands them on.
        self.rules = tuple(
            torch.full(self.seeds.shape, value, dtype=dtype, device=self.seeds.device)
            for value, dtype in (
                (self.temperature, torch.float32),
                (self.top_k, torch.int32),
                (self.top_p, torch.float32),
                (self.min_p, torch.float32),
            )
        )

    @classmethod
    def from_config(
        cls, processors: LogitsProcessorList, config: GenerationConfig, seeds: Tensor, batch_size: int
    ) -> TokenChoice:
        """Splits Hugging Face's list into the part that runs per node and the tail that the op fuses."""
        keep = bool(config.return_dict_in_generate)
        keep_scores = keep and bool(config.output_scores)
        split = len(processors) if keep_scores or not config.do_sample else _fusable_tail(processors)
        fused: dict[str, float] = {"temperature": 1.0 if config.do_sample else 0.0}
        for warper in processors[split:]:
            fused |= _fused_setting(warper)
        rest = LogitsProcessorList(_rowwise(p) for p in processors[:split])
        return cls(
            rest if rest or keep_scores else None,
            fused["temperature"],
            int(fused.get("top_k", 0)),
            fused.get("top_p", 1.0),
            fused.get("min_p", 0.0),
            seeds,
            keep_scores,
            keep and bool(config.output_logits),
        )

    def pick(self, logits: Tensor, tree: TokenTree, positions: Tensor, seeds: Tensor) -> AcceptedPath:
        """The fused op with these settings; ``positions [B]`` is the roots' absolute position."""
        if logits.dtype == torch.float64:
            logits = logits.float()
        rules = tuple(rule.to(logits.device) for rule in self.rules)
        if logits.shape[0] != len(rules[0]):
            rules = tuple(rule[:1].expand(logits.shape[0]) for rule in rules)
        outputs = _verify_tree(
            logits,
            tree.tokens,
            tree.parents,
            tree.num_nodes,
            *rules,
            seeds.to(logits.device),
            positions.to(logits.device),
        )
        return AcceptedPath(*outputs)


class RowPrefixConstraint:
    """PrefixConstrainedLogitsProcessor that is asked about chosen rows only.

    The user's function may raise for a prefix that is not its row's own, so rows that are not being decided
    at this length must not reach it.
    """

    def __init__(self, processor: PrefixConstrainedLogitsProcessor):
        self.allowed = processor._prefix_allowed_tokens_fn
        self.rows: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mask = torch.full_like(scores, float("-inf"))
        for row in self.rows:
            allowed = list(self.allowed(row, input_ids[row]))
            if not allowed:
                raise ValueError(
                    f"prefix_allowed_tokens_fn returned no token for row {row}; it must allow at least one"
                )
            mask[row, allowed] = 0
        return scores + mask


def verify(
    logits: Tensor, tree: TokenTree, choice: TokenChoice, positions: Tensor, sequences: list[list[int]]
) -> Verified:
    """Decides one pass.

    Args:
        logits: ``[B, N, V]`` of the tree's nodes.
        tree: the trees the target just scored (``num_nodes`` 0 for rows that take no part).
        choice: how tokens are picked.
        positions: ``[B]`` int64 absolute position of each root, padding not counted.
        sequences: per row the tokens up to and including the root, left padding included: what logits
            processors are shown. Only read when there are processors.

    Raises:
        FloatingPointError: a visited node has no distribution (NaN, all -inf, or +inf when sampling).
    """
    if choice.processors is None:
        accepted = choice.pick(logits, tree.to(logits.device), positions, choice.seeds)
        return Verified(accepted, None, _visited(logits, accepted) if choice.keep_logits else None)
    return _verify_with_processors(logits, tree, choice, positions, sequences)


def check_distributions(next_tokens: list[int], lengths: list[int]) -> None:
    """Raises FloatingPointError for a row that took part and got no token."""
    for row, (token, length) in enumerate(zip(next_tokens, lengths, strict=True)):
        if length and token < 0:
            raise FloatingPointError(
                f"row {row}: the model's logits hold NaN, only -inf, or (sampling) +inf after "
                f"{length - 1} accepted drafts; no token can be chosen from them"
            )


def _verify_with_processors(
    logits: Tensor, tree: TokenTree, choice: TokenChoice, positions: Tensor, sequences: list[list[int]]
) -> Verified:
    batch, width, _ = logits.shape
    tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
    counts = tree.num_nodes.tolist()
    paths: list[list[int]] = [[0] if count else [] for count in counts]
    logprobs = torch.zeros((batch, width), dtype=torch.float32)
    next_tokens = [-1] * batch
    scores: list[list[Tensor]] = [[] for _ in range(batch)]
    raw: list[list[Tensor]] = [[] for _ in range(batch)]
    active = [b for b in range(batch) if counts[b]]
    depth = 0
    while active:
        nodes = [paths[b][-1] for b in active]
        row_logits = logits[active, nodes].to(torch.float32)
        prefixes = {
            b: [*sequences[b], *(tokens[b][node] for node in paths[b][1:])] for b in range(batch) if counts[b]
        }
        processed = process_rows(choice.processors, row_logits, active, prefixes, batch)
        picked = choice.pick(
            processed[:, None],
            _roots(len(active), logits.device),
            positions[active] + depth,
            choice.seeds[active],
        )
        logprobs[active, depth] = picked.logprobs[:, 0].cpu()
        still = []
        for i, (b, token) in enumerate(zip(active, picked.next_token.tolist(), strict=True)):
            scores[b].append(processed[i])
            raw[b].append(row_logits[i])
            next_tokens[b] = token
            child = _child(tokens[b], parents[b], counts[b], paths[b][-1], token)
            if child is not None:
                paths[b].append(child)
                still.append(b)
        active, depth = still, depth + 1
    padded = torch.tensor([[*path, *[-1] * (width - len(path))] for path in paths], dtype=torch.int32)
    accepted = AcceptedPath(
        padded.reshape(batch, width).to(logits.device),
        torch.tensor([len(path) for path in paths], dtype=torch.int32, device=logits.device),
        torch.tensor(next_tokens, dtype=torch.int64, device=logits.device),
        logprobs.to(logits.device),
    )
    return Verified(accepted, scores if choice.keep_scores else None, raw if choice.keep_logits else None)


def process_rows(
    processors: LogitsProcessorList | None,
    row_logits: Tensor,
    active: list[int],
    prefixes: dict[int, list[int]],
    batch: int,
) -> Tensor:
    """Runs the processors for some rows of the batch, ``[len(active), V]`` -> the same.

    Processors may hold one entry per row of the batch (padding lengths, encoder ids), so they are always
    called with a full batch; rows of other lengths ride along as filler and their result is dropped.
    """
    assert processors is not None
    out = torch.empty_like(row_logits)
    by_length: dict[int, list[int]] = {}
    for i, b in enumerate(active):
        by_length.setdefault(len(prefixes[b]), []).append(i)
    for members in by_length.values():
        filler = prefixes[active[members[0]]]
        rows = [filler] * batch
        scores = row_logits[members[0]].expand(batch, -1).clone()
        for i in members:
            rows[active[i]] = prefixes[active[i]]
            scores[active[i]] = row_logits[i]
        chosen = [active[i] for i in members]
        for processor in processors:
            if isinstance(processor, RowPrefixConstraint):
                processor.rows = chosen
        ids = torch.tensor(rows, dtype=torch.int64, device=row_logits.device).reshape(batch, -1)
        out[members] = processors(ids, scores)[chosen]
    return out


def _visited(logits: Tensor, accepted: AcceptedPath) -> list[list[Tensor]]:
    rows = zip(accepted.path.tolist(), accepted.length.tolist(), strict=True)
    return [
        [logits[b, node].to(torch.float32, copy=True) for node in path[:length]]
        for b, (path, length) in enumerate(rows)
    ]


def _roots(batch: int, device: torch.device) -> TokenTree:
    return TokenTree(
        torch.zeros((batch, 1), dtype=torch.int64, device=device),
        torch.full((batch, 1), -1, dtype=torch.int32, device=device),
        torch.ones(batch, dtype=torch.int32, device=device),
    )


def _child(tokens: list[int], parents: list[int], count: int, node: int, token: int) -> int | None:
    for child in range(node + 1, count):
        if parents[child] == node and tokens[child] == token:
            return child
    return None


def _fusable_tail(processors: LogitsProcessorList) -> int:
    """Index of the first processor of the longest suffix that verify_tree can apply itself."""
    split, latest = len(processors), len(_FUSED)
    while split:
        warper = processors[split - 1]
        rank = _FUSED.index(type(warper)) if type(warper) in _FUSED else len(_FUSED)
        if rank >= latest or getattr(warper, "filter_value", -float("inf")) != -float("inf"):
            break
        if getattr(warper, "min_tokens_to_keep", 1) > 1:
            break
        split, latest = split - 1, rank
    return split


def _fused_setting(warper: object) -> dict[str, float]:
    for kind, name in zip(_FUSED, ("temperature", "top_k", "top_p", "min_p"), strict=True):
        if isinstance(warper, kind):
            return {name: getattr(warper, name)}
    raise AssertionError(f"not a fused warper: {type(warper).__name__}")


def _rowwise(processor: object) -> object:
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        return RowPrefixConstraint(processor)
    return processor
