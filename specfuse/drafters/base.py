"""The Drafter protocol and the state a drafter sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specfuse.drafters.draft_states import DraftStates
from specfuse.tree import TokenTree


@dataclass
class DraftState:
    """What one call of the generation loop lets a drafter see; one object per call, B rows.

    Args:
        prompts: per row, the prompt's token ids without padding.
        answers: per row, the token ids emitted so far (empty before the first pass). Grows in place.
        active: per row, False once the row has finished; its tree is ignored.
        remaining: per row, how many tokens may still be emitted (1 means: drafting is pointless).
        visual_token_ids: placeholder ids that stand for pixels in the prompt; they carry no text.
        inputs: the target's own inputs (``input_ids``, ``attention_mask``, pixel values ...).
        draft_inputs: inputs meant for the drafter alone, where the caller gave some; else None.
        events: for drafters with ``takes_events``: per row an EventStream or the path of an event file, or a
            mapping that a drafter's ``see`` made; None where the caller gave none.
        vocab_size: the target's vocabulary; ids at or above it can never be accepted.
        evidence: per row, another model's answer to the same question, or None.
        choice: how the target picks tokens (a ``specfuse.verify.TokenChoice``), or None; a drafter with
            logits of its own can pick with the same noise, so that its sampled drafts agree with the target
            as often as possible.
        prompt_hidden: for drafters with ``needs_target``, else None: ``[B, n, D]`` what the target's decoder
            hands to its head (after the final norm) at the n prompt tokens before the last, or as many of
            them as this call computed: those before come from a cache. Left padding has states of no meaning.
        hidden: for drafters with ``needs_target``, else empty: one entry per pass, states ``[B, m, D]`` and
            per row how many of them count. The j-th state of a row that counts is that of the token before
            ``answers[row][j]``.
        prompt_lengths: per row, the prompt's tokens as the target's noise counts them, where ``prompts`` do
            not say (a prompt of embeddings has no ids); None: their lengths.
        draft_states: where a drafter with ``gives_states`` leaves its decoder's states; None: nobody asks.
        memory: private data a drafter keeps for the length of this call, keyed by the drafter object's id.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    active: list[bool]
    remaining: list[int]
    visual_token_ids: frozenset[int] = frozenset()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    draft_inputs: Mapping[str, Tensor] | None = None
    events: Sequence[Any] | Mapping[str, Tensor] | None = None
    vocab_size: int | None = None
    evidence: Sequence[Sequence[int] | None] | None = None
    choice: Any = None
    prompt_hidden: Tensor | None = None
    hidden: list[tuple[Tensor, list[int]]] = field(default_factory=list)
    prompt_lengths: Sequence[int] | None = None
    draft_states: DraftStates | None = None
    memory: dict[int, Any] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        return len(self.prompts)

    def root(self, row: int) -> int:
        """The last committed token of a row, root of its next tree (0 behind a prompt of embeddings)."""
        if self.answers[row]:
            return self.answers[row][-1]
        return self.prompts[row][-1] if self.prompts[row] else 0

    def question(self, row: int) -> tuple[int, ...]:
        """The prompt's text tokens: what two clips asked the same thing have in common."""
        return tuple(token for token in self.prompts[row] if token not in self.visual_token_ids)


class Drafter:
    """Proposes a tree of tokens for every row of a batch. Subclass it and write ``propose``.

    A drafter can be shared by many calls, also at once: what belongs to one call lives in ``state.memory``.
    Nothing a drafter proposes can change the answer; a bad one only costs time. The exception is a token on
    which the model itself computes NaN (a broken embedding): drafting it can raise FloatingPointError.
    """

    needs_target: bool = False
    """True for a drafter that reads the target's hidden states: it gets them, and no first tree."""

    takes_events: bool = False
    """True for a drafter that reads ``state.events``; a call's ``events=`` is refused where none does."""

    gives_states: bool = False
    """True for a drafter that fills ``state.draft_states`` where it is asked to."""

    @property
    def drafts_first(self) -> bool:
        """Whether it is asked before the target's first pass, which then carries its tree."""
        return not self.needs_target

    def begin(self, state: DraftState) -> None:
        """Called once, before the target's first pass: work that may go on beside it can start here."""

    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        """Trees for all B rows, on the CPU.

        Args:
            state: the rows so far.
            max_nodes: budget of drafted nodes per row, the root not counted.

        Returns:
            TokenTree with ``width <= max_nodes + 1``; node 0 of row b is ``state.root(b)``; a row with
            nothing to propose, or not ``active``, has only its root. ``probs`` where the drafter has an
            estimate.
        """
        raise NotImplementedError

    def observe(self, tokens: Sequence[int], question: Sequence[int] = ()) -> None:
        """Called once with every finished answer (token ids) and its question. Learns nothing by default."""

    def learn(self, state: DraftState) -> None:
        """Called once at the end of a call, with all its answers; shows each row to :meth:`observe`."""
        for row, answer in enumerate(state.answers):
            self.observe(answer, question=state.question(row))


def root_only(state: DraftState) -> TokenTree:
    """Trees that propose nothing: plain decoding for this pass."""
    batch = state.batch_size
    # Plain decoding asks for this every token; only the roots change.
    unchanged = state.memory.get(0)
    if unchanged is None:
        parents = torch.full((batch, 1), -1, dtype=torch.int32)
        unchanged = state.memory[0] = (parents, torch.ones(batch, dtype=torch.int32))
    roots = torch.tensor([state.root(b) for b in range(batch)], dtype=torch.int64).reshape(batch, 1)
    return TokenTree(roots, *unchanged)
