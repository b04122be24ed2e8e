"""BlockDrafter: sixteen tokens at once, from features of events and the last tokens of the text."""

from __future__ import annotations

import torch
from torch import Tensor

from specfuse.adapters import CompressionDrafter
from specfuse.drafters.base import Drafter, DraftState, root_only
from specfuse.drafters.event import EventDrafter
from specfuse.tree import TokenTree


class BlockDrafter(Drafter):
    """Drafts with a compression drafter: one small pass for a chain of K tokens, no cache.

    Args:
        adapter: trained by ``specfuse train adapter --kind compression``.
        eyes: an :class:`EventDrafter` of the EventGPT that the adapter was trained behind; only what it sees
            of events is used.
        least: drafts are cut off where the chance that all of them so far are right falls below this.

    Raises:
        ValueError: features of another width than the adapter reads, or ``least`` outside 0 to 1.
    """

    takes_events = True

    def __init__(self, adapter: CompressionDrafter, eyes: EventDrafter, *, least: float = 0.1):
        width = eyes.model.config.get_text_config().hidden_size
        if adapter.config.features != width:
            raise ValueError(
                f"adapter must read features of width {width}, got one of {adapter.config.features}"
            )
        if not 0 <= least <= 1:
            raise ValueError(f"least must lie in 0 to 1, got {least}")
        self.adapter, self.eyes, self.least = adapter.eval(), eyes, least

    @torch.no_grad()
    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        """A chain for each active row."""
        wanted = [b for b in range(state.batch_size) if state.active[b] and state.remaining[b] > 1]
        if not wanted or max_nodes < 1:
            return root_only(state)
        if (features := state.memory.get(id(self))) is None:
            features = state.memory[id(self)] = self.eyes.own_inputs(state)["event_features"]
        text = torch.tensor([self._text(state, b) for b in wanted], device=features.device)
        logits = self.adapter(features[wanted].to(self.adapter.dtype), text)
        chains = [([state.root(b)], [1.0]) for b in range(state.batch_size)]
        for b, row in zip(wanted, logits, strict=True):
            longest = min(max_nodes, state.remaining[b] - 1)
            chains[b] = _chain(state.root(b), row[:longest], self.least)
        tokens, probs = zip(*chains, strict=True)
        return TokenTree.from_parents(tokens, [list(range(-1, len(row) - 1)) for row in tokens], probs)

    def _text(self, state: DraftState, row: int) -> list[int]:
        """The last tokens behind the video, as in training: a short text begins with its first again."""
        prompt = state.prompts[row]
        start = max((i + 1 for i, token in enumerate(prompt) if token in state.visual_token_ids), default=0)
        words = [*prompt[start:], *state.answers[row]] or [0]
        missing = max(self.adapter.config.context - len(words), 0)
        return words[:1] * missing + words[-self.adapter.config.context :]


def _chain(root: int, logits: Tensor, least: float) -> tuple[list[int], list[float]]:
    """The most likely token of each row of ``[K, V]``, as far as all of them are likely enough."""
    best = logits.float().softmax(-1).max(-1)
    sure = best.values.cumprod(-1)
    count = int((sure >= least).sum())
    return [root, *best.indices[:count].tolist()], [1.0, *sure[:count].tolist()]
