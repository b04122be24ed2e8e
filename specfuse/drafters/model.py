"""ModelDrafter: any Hugging Face causal or video language model drafts, with its own inputs where given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specfuse.drafters.base import Drafter, DraftState, root_only
from specfuse.drafters.beside import Beside
from specfuse.drafters.growing import GrowingTree
from specfuse.drafters.same_noise import samples
from specfuse.drafters.vocabulary import SameIds, vocabulary_for
from specfuse.passes.tree_forward import TreeForward
from specfuse.tree import TokenTree

_RESERVED_ANSWER = 1024
_EVENTS = ("event_", "pixel_values_events")
"""What the names of a call's inputs for an EventDrafter, or a head with events, begin with."""


class ModelDrafter(Drafter):
    """Drafts with a smaller model that shares the target's vocabulary.

    The model sees its own inputs where there are some (``inputs`` here, or ``draft_inputs=`` of the call),
    else the target's, pixels included: a video language model drafting for another one sees the video. Own
    pixels without ``input_ids`` go with the target's prompt. A
    text-only model gets the prompt without the placeholders of the video. Under sampling it picks with the
    target's own noise, so a good draft model agrees with the target as often as the two distributions allow.

    Args:
        model: a Hugging Face decoder-only model whose token ids mean what the target's mean.
        inputs: fixed inputs for this drafter (``input_ids [B, P]``, ``attention_mask``, pixels ...).
        depth: how many tokens deep it drafts; each costs one pass of the draft model.
        branching: 1 drafts a chain; k > 1 a tree: k children per node, the k best nodes of a level go on.
        tokenizer: the draft model's, where its ids may mean other things than the target's.
        target_tokenizer: the target's, together with ``tokenizer``.
        vocabulary: how the two are brought together, see :func:`specfuse.drafters.vocabulary.vocabulary_for`:
            "same" ids, token by token in their "intersection", as a "string" that the target's tokenizer
            splits again, or "auto".

        overlap: read the prompt while the target reads it, in a thread, on a GPU on a stream of its own; the
            target's first pass then carries no drafts.

    Raises:
        ValueError: ``depth`` or ``branching`` below 1, a model that is no Hugging Face model, or vocabularies
            that can not be brought together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        inputs: Mapping[str, Tensor] | None = None,
        depth: int = 5,
        branching: int = 1,
        tokenizer: Any = None,
        target_tokenizer: Any = None,
        vocabulary: str = "auto",
        overlap: bool = False,
    ):
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
        if depth < 1 or branching < 1:
            raise ValueError(f"depth and branching must be at least 1, got {depth} and {branching}")
        self.model, self.inputs = model, inputs
        self.depth, self.branching, self.overlap = depth, branching, overlap
        size = model.config.get_text_config(decoder=True).vocab_size
        self.vocabulary = vocabulary_for(vocabulary, target_tokenizer, tokenizer, size)
        # Other ids than the target's draft other tokens than were computed.
        self.gives_states = type(self.vocabulary) is SameIds

    @property
    def drafts_first(self) -> bool:
        return not self.overlap

    def begin(self, state: DraftState) -> None:
        if self.overlap and any(state.active) and max(state.remaining) > 1:
            state.memory[id(self)] = Beside(lambda: self._start(state), self.model.device)

    def _start(self, state: DraftState) -> _Draft:
        return _Draft(self.model, self.own_inputs(state), state, self.vocabulary)

    @torch.no_grad()
    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        levels = min(self.depth, max_nodes, max(state.remaining, default=0) - 1)
        if levels < 1 or not any(state.active):
            return root_only(state)
        draft = state.memory.get(id(self))
        if not isinstance(draft, _Draft):
            draft = state.memory[id(self)] = self._start(state) if draft is None else draft.result()
        logits = draft.catch_up(state)
        growing = [GrowingTree(state.root(b)) for b in range(state.batch_size)]
        frontier = [[0] for _ in growing]
        kept = state.draft_states
        if kept is not None and draft.last_states is not None:
            kept.keep_roots(draft.last_states)
        for level in range(levels):
            frontier = self._expand(draft, growing, frontier, logits, state)
            if level + 1 < levels:
                logits = draft.run_level(growing, frontier)
                if kept is not None and draft.forward.states is not None:
                    for b, (tree, nodes) in enumerate(zip(growing, frontier, strict=True)):
                        paths = [tuple(tree.tokens[n] for n in tree.path(node)) for node in nodes]
                        kept.keep(b, paths, draft.forward.states[b])
        draft.forward.cache.set_lengths(draft.forward.cache.lengths)
        rows = []
        for b, tree in enumerate(growing):
            active = state.active[b]
            rows.append(
                (self.vocabulary.translate(state, b, tree) if active else tree).best(active * max_nodes)
            )
        return TokenTree.from_parents(*map(list, zip(*rows, strict=True)))

    def own_inputs(self, state: DraftState) -> dict[str, Any]:
        """The draft model's inputs: the call's, the drafter's, or what it understands of the target's.

        Raises:
            ValueError: there are none that it understands.
        """
        accepted = inspect.signature(self.model.forward).parameters
        own = (state.draft_inputs if state.draft_inputs is not None else self.inputs) or {}
        if "input_ids" in own:
            return {n: value for n, value in own.items() if n in accepted or not n.startswith(_EVENTS)}
        if unknown := sorted(name for name in own if not name.startswith((*_EVENTS, "pixel_values"))):
            raise ValueError(f"draft_inputs must hold input_ids or pixels, got {unknown}")
        takes_pixels = any(name.startswith("pixel_values") for name in accepted)
        shown = any(token in state.visual_token_ids for prompt in state.prompts for token in prompt)
        inputs = {**state.inputs, **{name: value for name, value in own.items() if name in accepted}}
        given = any(name.startswith("pixel_values") and v is not None for name, v in inputs.items())
        if takes_pixels and shown and not given:
            raise ValueError(
                "the draft model needs pixels and the call has only encoded ones: pass draft_inputs=..., or "
                "call specfuse.generate with the pixels"
            )
        if not state.inputs["input_ids"].shape[1]:
            raise ValueError(
                "the prompt is given as embeddings: the draft model needs draft_inputs=... of its own"
            )
        translated = self.vocabulary.kind != "same"
        if takes_pixels and shown and translated:
            raise ValueError(
                "the draft model sees pixels and has another vocabulary: pass draft_inputs=... with a prompt "
                "of its own"
            )
        if (takes_pixels or not shown) and not translated:
            shared = {k: v for k, v in inputs.items() if k in accepted and v is not None}
            shared.pop("inputs_embeds", None)
            return shared | {"input_ids": state.inputs["input_ids"]}
        if translated:
            prompts = [
                self.vocabulary.prompt(list(state.question(b))) or [0] for b in range(state.batch_size)
            ]
        else:
            vocab = self.vocabulary.size
            prompts = [[t for t in state.question(b) if t < vocab] or [0] for b in range(state.batch_size)]
        return left_padded(prompts, self.model.device)

    def _expand(
        self,
        draft: _Draft,
        growing: list[GrowingTree],
        frontier: list[list[int]],
        logits: Tensor,
        state: DraftState,
    ) -> list[list[int]]:
        """Gives every frontier node its children; the best ``branching`` of them are the new frontier."""
        logits = self.vocabulary.restrict(logits)
        width = min(self.branching, logits.shape[-1])
        chances, tokens = logits.float().softmax(-1).topk(width, dim=-1)
        sampled = None
        if samples(state):
            sampled = self.vocabulary.pick(state, logits, growing, frontier).tolist()
        following = []
        for b, tree in enumerate(growing):
            new = []
            for i, node in enumerate(frontier[b]):
                row = list(zip(tokens[b, i].tolist(), chances[b, i].tolist(), strict=True))
                if sampled is not None:
                    # The token that the target would pick if the models agreed; the rest are its
                    # alternatives.
                    pick = sampled[b][i]
                    row = [(pick, row[0][1]), *(pair for pair in row if pair[0] != pick)][:width]
                children = [tree.add(node, token, chance) for token, chance in row]
                if node == tree.trunk[-1] and len(tree.trunk) == draft.depth + 1:
                    tree.trunk.append(children[0])
                new += children
            new.sort(key=tree.rank)
            following.append(sorted(new[: self.branching]))
        draft.depth += 1
        return following


class _Draft:
    """The draft model's cache for one request: prompt, committed answer, then the tree being grown."""

    def __init__(
        self, model: PreTrainedModel, inputs: dict[str, Any], state: DraftState, vocabulary: SameIds
    ):
        ids, mask = inputs["input_ids"], inputs.pop("attention_mask", None)
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"the drafter's input_ids must be a tensor [B={state.batch_size}, P], got {got}")
        batch, length = ids.shape
        if batch != state.batch_size:
            raise ValueError(f"the drafter's inputs have {batch} rows, the target's {state.batch_size}")
        self.vocabulary = vocabulary
        reserve = min(max(state.remaining), _RESERVED_ANSWER) + 64
        self.forward = TreeForward(model, batch, length + reserve)
        self.forward.keeps_states = state.draft_states is not None
        self.last_logits = self.forward.prefill(inputs, mask)
        states = self.forward.states
        self.last_states = None if states is None else states.clone()  # [B, 1, D] beside last_logits
        self.forward.cache.set_lengths([length] * batch)
        self.prompt_slots, self.prompt_logits = length, self.last_logits.clone()
        self.fed: list[list[int]] = [[] for _ in range(batch)]  # the answer, in the draft model's ids
        self.prompt_lengths = (
            torch.full((batch,), length) if mask is None else mask.sum(dim=1).to("cpu", torch.int64)
        )
        self.depth = 0
        self.slots: list[list[int]] = []

    def catch_up(self, state: DraftState) -> Tensor:
        """Feeds what was committed since the last call; returns logits ``[B, 1, V]`` behind each root."""
        self.depth = 0
        self.slots = [[] for _ in state.answers]
        new = [self._cut_back(state, b) if active else [] for b, active in enumerate(state.active)]
        longest = max(map(len, new))
        if longest:
            lengths = [self.prompt_slots + len(fed) for fed in self.fed]
            self.forward.cache.set_lengths(lengths)
            tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in new])
            starts = self.prompt_lengths + torch.tensor([len(fed) for fed in self.fed])
            positions = starts[:, None] + torch.arange(longest)
            causal = torch.ones(longest, longest, dtype=torch.bool).tril().expand(len(new), -1, -1)
            logits = self.forward.forward(tokens, positions, causal)
            self.forward.cache.set_lengths([n + len(row) for n, row in zip(lengths, new, strict=True)])
            for b, row in enumerate(new):
                self.fed[b] += row
                if row:
                    self.last_logits[b, 0] = logits[b, len(row) - 1]
                    if self.last_states is not None and self.forward.states is not None:
                        self.last_states[b, 0] = self.forward.states[b, len(row) - 1]
        return self.last_logits

    def _cut_back(self, state: DraftState, b: int) -> list[int]:
        """What a row's answer adds, after the cache was cut back to what it still begins with."""
        fed = self.fed[b]
        wanted = self.vocabulary.follow(state, b, fed)
        if wanted == fed:
            return []
        kept = len(fed)
        if wanted[:kept] != fed:
            pairs = enumerate(zip(wanted, fed, strict=False))
            kept = next((i for i, (one, other) in pairs if one != other), min(len(wanted), kept))
        # The last token is fed again where nothing is left: its logits are wanted.
        kept = min(kept, max(len(wanted) - 1, 0))
        del fed[kept:]
        if not wanted:
            self.last_logits[b, 0] = self.prompt_logits[b, 0]
        return wanted[kept:]

    def run_level(self, growing: list[GrowingTree], frontier: list[list[int]]) -> Tensor:
        """Runs the frontier nodes (as many in every row); returns their logits ``[B, q, V]``."""
        count = max(map(len, frontier))
        pending = self.forward.cache.pending
        mask = torch.zeros((len(growing), count, pending + count), dtype=torch.bool)
        tokens = torch.zeros((len(growing), count), dtype=torch.int64)
        for b, tree in enumerate(growing):
            mask[b, :, pending:].fill_diagonal_(True)
            for i, node in enumerate(frontier[b]):
                tokens[b, i] = tree.tokens[node]
                for column, earlier in enumerate(self.slots[b]):
                    mask[b, i, column] = tree.is_ancestor(earlier, node)
            self.slots[b] += [*frontier[b], *[-1] * (count - len(frontier[b]))]
        roots = self.prompt_lengths + torch.tensor([len(fed) for fed in self.fed]) - 1
        positions = (roots + self.depth)[:, None].expand(-1, count)
        return self.forward.forward(tokens, positions, mask)


def left_padded(rows: Sequence[list[int]], device: torch.device) -> dict[str, Any]:
    """``input_ids`` and ``attention_mask`` ``[B, P]`` of prompts of different lengths."""
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
