"""HeadDrafter: a small layer on the target's own hidden states drafts a tree of tokens."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from transformers import PreTrainedModel

from specfuse.drafters.base import Drafter, DraftState, root_only
from specfuse.drafters.head_context import HeadContext
from specfuse.drafters.head_layer import DraftHead
from specfuse.drafters.head_tree import HeadTree
from specfuse.tree import TokenTree


class HeadDrafter(Drafter):
    """Drafts with a :class:`DraftHead`: what the target was about to say tells a good part of what follows.

    Every level of the tree is one pass of the head's one layer over the ``branching`` most probable nodes of
    the level before. The head looks back to the text behind the video, and to the events where it was trained
    with them (``events=EventDrafter.see(...)``). Under sampling it picks with the target's own noise.

    Args:
        head: trained for this target.
        target: the model that verifies; its embedding and its language-model head are used as they are.
        depth: levels of the tree at most.
        branching: nodes of a level that go on, and children of each.
        min_prob: nodes less likely to be reached than this are left out.
        level_prob: a further level is drafted where the nodes that go on are reached with at least this
            chance; below it, the level costs more time than it saves.

    Raises:
        ValueError: no DraftHead, ``depth`` or ``branching`` below 1, ``min_prob`` or ``level_prob`` outside
            [0, 1), or a head that was made for a target of another width or vocabulary.
    """

    needs_target = True
    gives_states = True

    def __init__(
        self,
        head: DraftHead,
        target: PreTrainedModel,
        *,
        depth: int = 10,
        branching: int = 3,
        min_prob: float = 0.03,
        level_prob: float = 0.3,
    ):
        if depth < 1 or branching < 1:
            raise ValueError(f"depth and branching must be at least 1, got {depth} and {branching}")
        for name, chance in (("min_prob", min_prob), ("level_prob", level_prob)):
            if not 0.0 <= chance < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {chance}")
        if not isinstance(head, DraftHead):
            raise ValueError(f"head must be a DraftHead, got {type(head).__name__}")
        check_fit(head, target)
        weight = head.from_token
        if (weight.device, weight.dtype) != (target.device, target.dtype):
            head = copy.deepcopy(head).to(target.device, target.dtype)
        self.head, self.takes_events = head, bool(head.config.event_width)
        with torch.no_grad():
            embedding: Any = target.get_input_embeddings()
            self.token_inputs = head.token_inputs(embedding.weight)
            self.to_logits = head.logits_of(target.get_output_embeddings())
        self.depth, self.branching = depth, branching
        self.min_prob, self.level_prob = min_prob, level_prob

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], target: PreTrainedModel, **options: Any
    ) -> HeadDrafter:
        """A drafter from a directory that ``specfuse train head`` wrote; ``options`` as for the class.

        Raises:
            FileNotFoundError: no such directory, or no weights in it.
            ValueError: broken files, no head, or one for another target.
        """
        return cls(DraftHead.from_pretrained(directory), target, **options)

    @torch.no_grad()
    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        levels = min(self.depth, max_nodes, max(state.remaining, default=0) - 1)
        if levels < 1 or not any(state.active) or not state.hidden:
            return root_only(state)
        context = state.memory.get(id(self))
        if context is None:
            self._check_states(state)
            context = state.memory[id(self)] = HeadContext(self.head, self.token_inputs, state)
        hidden = context.catch_up(state)
        kept = state.draft_states
        if kept is not None:
            kept.keep_roots(hidden)
        tree = HeadTree(state, self.branching, self.head)
        while True:
            chance = tree.add_level(self.to_logits(hidden))
            if tree.depth == levels or chance < self.level_prob:
                return tree.best(max_nodes, self.min_prob)
            above = tree.above[..., None].expand(-1, -1, hidden.shape[2])
            hidden = context.run_level(tree.tokens, hidden.gather(1, above), tree.depth)
            if kept is not None:
                kept.grow(tree.tokens, tree.above, hidden)

    def _check_states(self, state: DraftState) -> None:
        """Raises ValueError for states of another target than the drafter was made for."""
        states, (rows, width) = state.hidden[0][0], self.token_inputs.shape
        for name, mine, its in (
            ("hidden size", width, states.shape[2]),
            ("vocabulary", rows, max(state.vocab_size or 0, rows)),
            ("dtype", self.token_inputs.dtype, states.dtype),
            ("device", self.token_inputs.device, states.device),
        ):
            if mine != its and not (name == "dtype" and torch.is_autocast_enabled(states.device.type)):
                raise ValueError(
                    f"HeadDrafter was made for a target with {name} {mine}, this one has {its}; make another"
                )


def check_fit(head: DraftHead, target: PreTrainedModel) -> None:
    """Raises ValueError for a head that was made for a target of other sizes."""
    config = target.config.get_text_config(decoder=True)
    for name, mine, its in (
        ("hidden size", head.config.width, config.hidden_size),
        ("vocabulary", head.config.vocabulary, config.vocab_size),
    ):
        if mine != its:
            raise ValueError(f"the head was made for a target with {name} {mine}, this one has {its}")
