"""What a HeadDrafter remembers of one call: keys and values of what is committed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specfuse.drafters.base import DraftState
from specfuse.drafters.head_layer import DraftHead

LONGEST_PROMPT = 64
"""Prompt tokens that the head looks back to at most; the nearest ones."""
FIRST_SLOTS = 256


class _Part(NamedTuple):
    """New input of the layer: ``x [B, n, D]``, of which ``counts[b]`` belong to row b."""

    x: Tensor
    counts: list[int]
    at_end: bool = False  # whether the last ones of x are those that count

    def marks(self) -> list[list[bool]]:
        rows = []
        for count in self.counts:
            kept, padding = [True] * count, [False] * (self.x.shape[1] - count)
            rows.append(padding + kept if self.at_end else kept + padding)
        return rows


class HeadContext:
    """Events, the prompt's text and the answer in a cache of one layer, B rows.

    Rows share slots; what a row does not use of them is marked, and costs a little attention.

    Args:
        head: the layer.
        token_inputs: ``[V, D]`` what each token adds to x.
        state: of the call.
    """

    def __init__(self, head: DraftHead, token_inputs: Tensor, state: DraftState):
        self.head, self.token_inputs = head, token_inputs
        self.device, self.batch = token_inputs.device, state.batch_size
        width, heads = head.config.width, head.config.heads
        shape = (2, self.batch, heads, FIRST_SLOTS, width // heads)
        # Zeros, not empty: a masked slot still enters attention as 0 * value, and 0 * NaN is NaN.
        self.kv = torch.zeros(shape, dtype=token_inputs.dtype, device=self.device)
        self.used = 0  # slots
        self.counts = [0] * self.batch  # positions of each row
        self.valid: Tensor | None = None  # [B, used] bool; None: every row uses every slot
        self.read = 0  # entries of state.hidden
        self.given = [0] * self.batch  # tokens of each answer that came with them
        self.last = token_inputs.new_zeros((self.batch, 1, width))  # x of each row's last position

    def catch_up(self, state: DraftState) -> Tensor:
        """Takes in what was emitted since the last call; returns g ``[B, 1, D]`` at each row's last token."""
        parts = [] if self.read else [*self._events(state), *self._prompt(state)]
        for states, counts in state.hidden[self.read :]:
            rows = zip(state.answers, self.given, counts, strict=True)
            tokens = [answer[first : first + count] for answer, first, count in rows]
            self.given = [first + count for first, count in zip(self.given, counts, strict=True)]
            longest = max(counts)
            padded = [row + [0] * (longest - len(row)) for row in tokens]
            parts.append(_Part(self._input(torch.tensor(padded), states[:, :longest]), counts))
        self.read = len(state.hidden)
        # Nothing is new where the drafter is asked twice between passes.
        self.last = self._append(parts) if parts else self.last
        return self._look(self.last, 0)

    def run_level(self, tokens: Tensor, hidden: Tensor, depth: int) -> Tensor:
        """Computes g ``[B, k, D]`` of drafted tokens ``[B, k]``; ``hidden`` is g of the nodes above them."""
        return self._look(self._input(tokens, hidden), depth)

    # ---------------------------------------------------------------- what is committed

    def _events(self, state: DraftState) -> list[_Part]:
        size, project = self.head.config.event_width, self.head.events
        if project is None:
            return []
        given = state.events if isinstance(state.events, Mapping) else state.draft_inputs
        features = (given or {}).get("event_features")
        if features is None:
            raise ValueError(
                "the head was trained with events: pass their features, events=EventDrafter.see(...) or "
                "draft_inputs={'event_features': ...}"
            )
        shape = tuple(features.shape) if isinstance(features, Tensor) else ()
        if len(shape) != 3 or shape[0] not in (1, self.batch) or shape[2] != size:
            got = shape or type(features).__name__
            raise ValueError(f"event_features must be a tensor [B={self.batch}, K, {size}], got {got}")
        x = project(features.to(self.kv)).expand(self.batch, -1, -1)
        return [_Part(x, [features.shape[1]] * self.batch)]

    def _prompt(self, state: DraftState) -> list[_Part]:
        """The prompt's text behind the last visual token, as far back as there are states of it."""
        states = state.prompt_hidden
        known = 0 if states is None else min(states.shape[1], LONGEST_PROMPT)
        tokens = []
        for prompt in state.prompts:
            backwards = enumerate(reversed(prompt))
            text = next((i for i, token in backwards if token in state.visual_token_ids), len(prompt))
            tokens.append(prompt[len(prompt) - min(max(text - 1, 0), known) :])
        longest = max(map(len, tokens))
        if states is None or not longest:
            return []
        # States end together, with that of the last token but one; shorter rows are padded in front.
        padded = torch.tensor([[0] * (longest - len(row)) + row for row in tokens])
        x = self._input(padded, states[:, states.shape[1] - longest :])
        return [_Part(x, [len(row) for row in tokens], at_end=True)]

    def _input(self, tokens: Tensor, states: Tensor) -> Tensor:
        known = F.embedding(tokens.to(self.device), self.token_inputs)
        return known + self.head.state_inputs(states)

    def _append(self, parts: list[_Part]) -> Tensor:
        """Writes keys and values of new input; returns x ``[B, 1, D]`` of each row's last position."""
        x = parts[0].x if len(parts) == 1 else torch.cat([part.x for part in parts], dim=1)
        count, first = x.shape[1], self.used
        starts, last = self.counts, None
        self.counts = [n + sum(part.counts[b] for part in parts) for b, n in enumerate(starts)]
        self.used = end = first + count
        table = self.head.turns(2 * end, self.device)
        if self.valid is None and all(n == end for n in self.counts):
            turns = table[None, first:end]
        else:
            marks = torch.cat([torch.tensor(part.marks()) for part in parts], dim=1).to(self.device)
            before = marks.new_ones((self.batch, first)) if self.valid is None else self.valid
            self.valid = torch.cat([before, marks], dim=1)
            order = marks.cumsum(1)
            last = order.argmax(1)
            turns = table[(torch.tensor(starts, device=self.device)[:, None] + order - 1).clamp(min=0)]
        keys, values = self.head.keys_values(self.head.normed(x), turns)
        if end > self.kv.shape[3]:
            # Doubling keeps the copies rare.
            self.kv = F.pad(self.kv, (0, 0, 0, max(end - self.kv.shape[3], self.kv.shape[3])))
        self.kv[0, :, :, first:end] = keys
        self.kv[1, :, :, first:end] = values
        return x[:, -1:] if last is None else x.gather(1, last[:, None, None].expand(-1, 1, x.shape[2]))

    # ---------------------------------------------------------------- looking at it

    def _look(self, x: Tensor, depth: int) -> Tensor:
        """One pass over ``x [B, k, D]``, ``depth`` positions behind each row's last committed one."""
        table = self.head.turns(self.used + depth + 1, self.device)
        if self.valid is None:
            place, seen = self.used - 1 + depth, None
            turns = table[None, place : place + 1]
        else:
            turns = table[[n - 1 + depth for n in self.counts]][:, None]
            seen = self.valid[:, None, None]
        queries = self.head.queries(self.head.normed(x), turns)
        past = self.kv[:, :, :, : self.used]
        attended = F.scaled_dot_product_attention(queries, past[0], past[1], attn_mask=seen)
        return self.head.finish(x, attended)
