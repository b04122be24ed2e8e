"""Drafting for a target with another vocabulary, losslessly: the target verifies its own ids in any case.

Source: Timor et al., "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for
Heterogeneous Vocabularies", ICML 2025: token-level intersection (TLI) and string-level exact match (SLEM).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from specfuse.drafters.base import DraftState
from specfuse.drafters.growing import GrowingTree
from specfuse.drafters.pieces import Pieces, whole_characters
from specfuse.drafters.same_noise import pick_alike, root_positions

KINDS = ("auto", "same", "intersection", "string")
ENOUGH = 0.9
"""Share of the larger vocabulary's pieces that both must have for ``auto`` to map ids instead of text.

A large vocabulary that holds all of a small one is no match: its longer pieces, which the drafter would say,
are missing on the other side. Among small tokenizers of all families, strings brought more tokens per pass
than the intersection wherever the two were not the same pieces under other ids.
"""
LOOK_BACK = 8
"""Drafter tokens at the end of the answer that may be split in another way once more text follows."""


class SameIds:
    """The drafter's ids mean what the target's mean.

    Args:
        size: ids of the drafter; the target's above become 0.
    """

    kind = "same"

    def __init__(self, size: int):
        self.size = size

    def prompt(self, ids: list[int]) -> list[int]:
        """A part of the target's prompt in the drafter's ids."""
        return [token if token < self.size else 0 for token in ids]

    def follow(self, state: DraftState, row: int, fed: list[int]) -> list[int]:
        """A row's answer in the drafter's ids; ``fed`` is what it was before it grew."""
        return fed + self.prompt(state.answers[row][len(fed) :])

    def restrict(self, logits: Tensor) -> Tensor:
        """The drafter's logits ``[B, q, V]``, without what can not be said in the target's vocabulary."""
        return logits

    def pick(
        self, state: DraftState, logits: Tensor, trees: list[GrowingTree], nodes: list[list[int]]
    ) -> Tensor:
        """``[B, q]`` int64 ids of the drafter that the target's noise picks behind ``nodes`` of the trees."""
        depth = torch.tensor(
            [[len(tree.ancestors[n]) for n in row] for tree, row in zip(trees, nodes, strict=True)]
        )
        return pick_alike(state, logits, root_positions(state)[:, None] + depth)

    def translate(self, state: DraftState, row: int, tree: GrowingTree) -> GrowingTree:
        """The tree in the target's ids."""
        return tree


class Intersection(SameIds):
    """Token-level intersection: drafted is what both vocabularies spell alike, as one token each.

    Args:
        target, drafter: their pieces.
        size: rows of the drafter's logits.

    Raises:
        ValueError: no piece is in both vocabularies.
    """

    kind = "intersection"

    def __init__(self, target: Pieces, drafter: Pieces, size: int):
        super().__init__(size)
        self.target, self.drafter = target, drafter
        pairs = {d: t for piece, t in target.ids.items() if (d := drafter.ids.get(piece, size)) < size}
        if not pairs:
            raise ValueError(
                "vocabulary='intersection' needs tokens that both vocabularies spell alike; there is none"
            )
        self.to_target = pairs | _ends(target, drafter)
        self.ours = torch.tensor(sorted(self.to_target))
        self.theirs = torch.tensor([self.to_target[d] for d in self.ours.tolist()])
        self.blocked = torch.ones(size, dtype=torch.bool).index_fill(0, self.ours, False)
        self.to_drafter = {t: [d] for d, t in self.to_target.items()}

    def prompt(self, ids: list[int]) -> list[int]:
        return _prompt(self.target, self.drafter, ids, self._in_drafters)

    def follow(self, state: DraftState, row: int, fed: list[int]) -> list[int]:
        return self._in_drafters(state.answers[row])

    def _in_drafters(self, tokens: list[int]) -> list[int]:
        for token in tokens:
            if token not in self.to_drafter:
                # What is one token to the target only is spelled: the drafter goes on from the same text.
                self.to_drafter[token] = self.drafter.longest(self.target.spell([token]))
        return [ours for token in tokens for ours in self.to_drafter[token]]

    def restrict(self, logits: Tensor) -> Tensor:
        self.blocked = self.blocked.to(logits.device)
        return logits.masked_fill(self.blocked, -torch.inf)

    def pick(
        self, state: DraftState, logits: Tensor, trees: list[GrowingTree], nodes: list[list[int]]
    ) -> Tensor:
        size = max(state.vocab_size or 0, len(self.target.spelled), int(self.theirs.max()) + 1)
        ours, theirs = self.ours.to(logits.device), self.theirs.to(logits.device)
        # Noise belongs to the target's ids.
        moved = logits.new_full((*logits.shape[:2], size), -torch.inf)
        moved[..., theirs] = logits[..., ours]
        back = torch.zeros(size, dtype=torch.int64, device=logits.device).index_copy(0, theirs, ours)
        return back[super().pick(state, moved, trees, nodes)]

    def translate(self, state: DraftState, row: int, tree: GrowingTree) -> GrowingTree:
        # -1, which the loop drops, for what is blocked: more children were asked for than there are.
        tree.tokens[1:] = [self.to_target.get(token, -1) for token in tree.tokens[1:]]
        return tree


class Strings(SameIds):
    """String-level exact match: what the drafter says is text, which the target's tokenizer splits again.

    Splitting is not concatenative: the last tokens of the answer are split anew with what follows, and the
    drafter's cache is cut back to what stayed the same. Nothing is drafted in the middle of a character.

    Args:
        target, drafter: their pieces.
        size: rows of the drafter's logits.
    """

    kind = "string"

    def __init__(self, target: Pieces, drafter: Pieces, size: int):
        super().__init__(size)
        self.target, self.drafter = target, drafter
        self.ends = _ends(target, drafter)

    def prompt(self, ids: list[int]) -> list[int]:
        return _prompt(
            self.target, self.drafter, ids, lambda tokens: self.drafter.first(self.target.spell(tokens))
        )

    def follow(self, state: DraftState, row: int, fed: list[int]) -> list[int]:
        text = whole_characters(self.target.spell(state.answers[row]))
        kept = fed[: max(len(fed) - LOOK_BACK, 0)]
        before = self.drafter.spell(kept)
        if not text.startswith(before):
            kept, before = [], b""
        rest = text[len(before) :]
        new = self.drafter.after(self._prompt_end(state, row) + before, rest)
        # A drafter that can not spell the text, one without capitals say, reads it as well as it can.
        return kept + new if self.drafter.spell(new) == rest else self.drafter.encode(text)

    @cached_property
    def first(self) -> Tensor:
        """``[V]`` int64: the target's token that the text of each id of the drafter begins with, or -1."""
        found = [-1] * self.size
        for token, piece in enumerate(self.drafter.spelled[: self.size]):
            found[token] = next(iter(self.target.longest(piece or b"")), -1)
        for ours, theirs in self.ends.items():
            found[ours] = theirs
        return torch.tensor(found)

    def pick(
        self, state: DraftState, logits: Tensor, trees: list[GrowingTree], nodes: list[list[int]]
    ) -> Tensor:
        size = max(state.vocab_size or 0, len(self.target.spelled))
        first = self.first.to(logits.device).expand_as(logits)
        chances = logits.float().softmax(-1).masked_fill(first < 0, 0.0)
        begins = chances.new_zeros((*logits.shape[:2], size)).scatter_add(-1, first.clamp(min=0), chances)
        depth = [
            [len(self._split(state, b, tree, node)) for node in row]
            for b, (tree, row) in enumerate(zip(trees, nodes, strict=True))
        ]
        positions = root_positions(state)[:, None] + torch.tensor(depth)
        picked = pick_alike(state, begins.log(), positions)
        return logits.masked_fill(first != picked[..., None], -torch.inf).argmax(-1)

    def translate(self, state: DraftState, row: int, tree: GrowingTree) -> GrowingTree:
        found = GrowingTree(tree.tokens[0])
        answered = self.target.spell(state.answers[row])
        if whole_characters(answered) != answered:
            return found
        children: dict[tuple[int, int], int] = {}
        parents = set(tree.parents)
        leaves = sorted((n for n in range(1, len(tree.tokens)) if n not in parents), key=tree.rank)
        for leaf in leaves:
            path = tree.path(leaf)
            ids = self._split(state, row, tree, leaf)[: state.remaining[row] - 1]
            self._add(found, children, ids, path, tree)
            if leaf in tree.trunk:
                found.trunk = list(range(len(found.tokens)))
        return found

    def _add(
        self,
        found: GrowingTree,
        children: dict[tuple[int, int], int],
        ids: list[int],
        path: list[int],
        tree: GrowingTree,
    ) -> None:
        """Adds a path of the target's ids, each as likely as the drafter's tokens that it takes."""
        place, end, reached, spent = 0, 0, 0, 0
        for token in ids:
            end += len(self.target.spell([token])) or 1
            while spent < end and reached < len(path):
                spent += len(self.drafter.spell([tree.tokens[path[reached]]])) or 1
                reached += 1
            node = children.get((place, token))
            if node is None:
                chance = tree.probs[path[reached - 1]] / max(found.probs[place], 1e-30)
                node = children[place, token] = found.add(place, token, min(chance, 1.0))
            place = node

    def _split(self, state: DraftState, row: int, tree: GrowingTree, node: int) -> list[int]:
        """The target's ids of the text on the way to a node, up to the end of the answer."""
        tokens = [tree.tokens[n] for n in tree.path(node)]
        stop = next((i for i, token in enumerate(tokens) if token in self.drafter.special), len(tokens))
        text = whole_characters(self.drafter.spell(tokens[:stop]))
        before = self._prompt_end(state, row) + self.target.spell(state.answers[row][-LOOK_BACK:])
        ids = self.target.after(before, text)
        ended = stop < len(tokens) and tokens[stop] in self.ends
        return [*ids, self.target.end] if ended and self.target.spell(ids) == text else ids

    def _prompt_end(self, state: DraftState, row: int) -> bytes:
        return self.target.spell(state.prompts[row][-LOOK_BACK:])


def vocabulary_for(kind: str, target: Any, drafter: Any, size: int) -> SameIds:
    """How a drafter with one tokenizer drafts for a target with another.

    Args:
        kind: ``"same"``, ``"intersection"``, ``"string"``, or ``"auto"``: the same ids where the tokenizers
            agree on them, else the intersection where it holds ``ENOUGH`` of the pieces of both, else
            strings.
        target, drafter: their tokenizers, or processors with one; both None: the ids are the same.
        size: rows of the drafter's logits.

    Raises:
        ValueError: an unknown kind, a tokenizer missing, ids that are not the same for ``"same"``, or no
            piece in both vocabularies for ``"intersection"``.
    """
    if kind not in KINDS:
        raise ValueError(f"vocabulary must be one of {', '.join(KINDS)}, got {kind!r}")
    target, drafter = (getattr(tokenizer, "tokenizer", tokenizer) for tokenizer in (target, drafter))
    if target is None and drafter is None and kind in ("auto", "same"):
        return SameIds(size)
    if target is None or drafter is None:
        name = "target_tokenizer" if target is None else "tokenizer"
        raise ValueError(f"{name} is missing: two vocabularies are compared by both tokenizers")
    theirs, ours = Pieces(target), Pieces(drafter)
    if kind == "same":
        check_same_tokens(target, drafter)
    if kind == "same" or (kind == "auto" and _alike(theirs, ours)):
        return SameIds(size)
    if kind == "auto":
        kind = "intersection" if shared(theirs, ours) >= ENOUGH else "string"
    return Intersection(theirs, ours, size) if kind == "intersection" else Strings(theirs, ours, size)


def shared(target: Pieces, drafter: Pieces) -> float:
    """Share of the pieces of the larger vocabulary that are in both."""
    return len(target.ids.keys() & drafter.ids.keys()) / max(len(target.ids), len(drafter.ids))


def different_tokens(target: Pieces, drafter: Pieces) -> list[str]:
    """The target's tokens that are another id, or spell another text, to the drafter; lowest id first.

    Placeholders and other added tokens of the target may be missing: they do not occur in answers.
    """
    ends = {name for name, token in target.names.items() if token in (target.begin, target.end)}
    text = target.names.keys() - target.added
    different = {name for name in ends | text if drafter.names.get(name) != target.names[name]}
    if target.decoder != drafter.decoder:
        ids = (target.names[name] for name in text - different)
        wrong = {token for token in ids if target.spelled[token] != drafter.spelled[token]}
        different |= {name for name in text if target.names[name] in wrong}
    return sorted(different, key=lambda name: target.names[name])


def _alike(target: Pieces, drafter: Pieces) -> bool:
    """The same ids, and few that the drafter has besides: what it says with them is never accepted."""
    more = drafter.names.keys() - drafter.added - target.names.keys()
    return not different_tokens(target, drafter) and len(more) <= (1 - ENOUGH) * len(drafter.names)


def check_same_tokens(target: Any, drafter: Any) -> None:
    """Compares what the ids of two tokenizers mean.

    Raises:
        ValueError: names the first token of the target's text that is another id to the drafter.
    """
    target, drafter = Pieces(target), Pieces(drafter)
    different = different_tokens(target, drafter)
    if different:
        name = different[0]
        raise ValueError(
            f"tokenizer: {len(different)} of the target's {len(target.names)} tokens are others to the "
            f"drafter, first {name!r}: {target.names[name]} to the target, {drafter.names.get(name)} to the "
            "drafter"
        )


def _ends(target: Pieces, drafter: Pieces) -> dict[int, int]:
    """The drafter's end of an answer, and the target's."""
    return {} if target.end is None or drafter.end is None else {drafter.end: target.end}


def _prompt(
    target: Pieces, drafter: Pieces, ids: list[int], translate: Callable[[list[int]], list[int]]
) -> list[int]:
    """A prompt in the drafter's ids: text by ``translate``, special tokens by their role or their name."""
    name_of = {target.names[name]: name for name in target.names if target.names[name] in target.special}
    roles = {target.begin: drafter.begin, target.end: drafter.end}
    found: list[int] = []
    text: list[int] = []
    for token in [*ids, None]:
        if token is not None and token not in target.special:
            text.append(token)
            continue
        found += translate(text) if text else []
        text = []
        if token is not None:
            other = roles.get(token) or drafter.names.get(name_of.get(token, ""))
            found += [other] if other is not None else []
    return found
