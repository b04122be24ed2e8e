"""Replays recorded answers through a drafter and the real verification op; needs no model.

A replayed pass is a pass of :func:`specfuse.generate` whose target predicts the recorded tokens: every node
of the draft tree gets logits whose argmax is the token recorded at the node's place, and ``verify_tree``
decides what survives. The first pass of an answer already carries a tree; an answer is learned only after its
last pass.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from specfuse.data.recording import Recording, Sample
from specfuse.drafters import (
    CombinedDrafter,
    CorpusDrafter,
    Drafter,
    DraftState,
    PromptLookupDrafter,
    root_only,
)
from specfuse.ops.verify_tree import verify_tree
from specfuse.tree import TokenTree

DRAFTERS = ("corpus", "lookup", "combined", "none")


class ReplayResult(NamedTuple):
    """What a replay measured."""

    answers: int
    tokens: int  # emitted tokens = recorded tokens
    passes: int  # target passes they took
    drafted: int  # drafted nodes over all passes, roots not counted
    histogram: dict[int, int]  # emitted tokens of a pass -> passes
    propose_us: list[float]  # drafting time of each pass, microseconds
    learn_s: float  # time in Drafter.observe, seconds

    @property
    def tokens_per_pass(self) -> float:
        """Mean emitted tokens per target pass; 1 is plain decoding."""
        return self.tokens / self.passes


def make_drafter(name: str) -> Drafter | None:
    """A new drafter of one of the kinds in ``DRAFTERS``; None for ``none``. Raises ValueError."""
    if name == "corpus":
        return CorpusDrafter()
    if name == "lookup":
        return PromptLookupDrafter()
    if name == "combined":
        return CombinedDrafter([CorpusDrafter(), PromptLookupDrafter()])
    if name == "none":
        return None
    raise ValueError(f"drafter must be one of {', '.join(DRAFTERS)}, got {name!r}")


def shuffled(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The samples in another order, the same for the same seed."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    return [samples[i] for i in order.tolist()]


def replay(
    recording: Recording,
    drafter: Drafter | None,
    nodes: int,
    *,
    learning: bool = True,
    evidence: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> ReplayResult:
    """Runs the recording's answers, in their order, through a drafter and ``verify_tree``.

    Args:
        recording: what the target said.
        drafter: None replays plain decoding. It keeps what it learns, and starts with what it knows.
        nodes: budget of drafted nodes per pass, the root not counted.
        learning: show each answer to the drafter after its last pass.
        evidence: give the drafter the recorded ``draft`` of the same clip as a hint.
        progress: called after every answer.

    Returns:
        A :class:`ReplayResult`. The length of each answer is known to the drafter as ``remaining``, as
        generation knows ``max_new_tokens``; drafts never reach beyond it.

    Raises:
        ValueError: ``nodes`` below 0 or above 1023.
    """
    if not 0 <= nodes <= 1023:
        raise ValueError(f"nodes must be from 0 to 1023, got {nodes}")
    if nodes == 0:
        drafter = None
    target = _RecordedTarget(recording, nodes)
    scopes = {question: i for i, question in enumerate(recording.questions)}
    histogram: Counter[int] = Counter()
    propose_us: list[float] = []
    tokens, drafted, learn_s = 0, 0, 0.0
    for sample in recording.samples:
        # The question stands in the prompt as one id beyond the vocabulary: it can never be drafted.
        prompt = [recording.vocab_size + scopes[sample.question]]
        hint = sample.draft if evidence else None
        state = DraftState(
            prompts=[prompt],
            answers=[[]],
            active=[True],
            remaining=[len(sample.target)],
            vocab_size=recording.vocab_size,
            evidence=None if hint is None else [hint],
        )
        emitted, sizes = _replay_answer(sample, state, drafter, nodes, target, propose_us)
        histogram.update(emitted)
        tokens += sum(emitted)
        drafted += sum(sizes)
        if drafter is not None and learning:
            known = {"evidence": hint} if hint is not None and isinstance(drafter, CorpusDrafter) else {}
            start = time.perf_counter()
            drafter.observe(sample.target, question=prompt, **known)
            learn_s += time.perf_counter() - start
        progress()
    return ReplayResult(
        answers=len(recording.samples),
        tokens=tokens,
        passes=histogram.total(),
        drafted=drafted,
        histogram=dict(sorted(histogram.items())),
        propose_us=propose_us,
        learn_s=learn_s,
    )


def _replay_answer(
    sample: Sample,
    state: DraftState,
    drafter: Drafter | None,
    nodes: int,
    target: _RecordedTarget,
    propose_us: list[float],
) -> tuple[list[int], list[int]]:
    """Emitted tokens and drafted nodes of each pass of one answer."""
    emitted, sizes = [], []
    answer = state.answers[0]
    while state.remaining[0]:
        start = time.perf_counter()
        tree = root_only(state) if drafter is None else drafter.propose(state, nodes)
        propose_us.append((time.perf_counter() - start) * 1e6)
        accepted = target.verify(tree, sample.target, len(answer))
        if accepted != list(sample.target[len(answer) : len(answer) + len(accepted)]):
            raise RuntimeError(
                f"sample {sample.id!r}: verify_tree emitted {accepted} after {len(answer)} tokens"
            )
        answer += accepted
        state.remaining[0] -= len(accepted)
        emitted.append(len(accepted))
        sizes.append(int(tree.num_nodes[0]) - 1)
    return emitted, sizes


class _RecordedTarget:
    """Stands in for the target model: the logits ``[1, N, V]`` that its recorded answers imply.

    V counts only the ids that occur in the recording, and one more that stands for every other id: nothing
    changes for the walk, and a pass does not wait for megabytes of zeros.
    """

    def __init__(self, recording: Recording, nodes: int):
        self.ids = sorted({token for sample in recording.samples for token in sample.target})
        self.columns = {token: column for column, token in enumerate(self.ids)}
        self.logits = torch.zeros(1, nodes + 1, len(self.ids) + 1)

    def verify(self, tree: TokenTree, recorded: Sequence[int], done: int) -> list[int]:
        """Tokens that one pass over ``tree`` emits when ``done`` tokens of the answer are there already."""
        # A node at the end of the answer has no recorded successor; its token is cut off below.
        last = len(recorded) - 1
        said = [self.columns[recorded[min(done + depth, last)]] for depth in tree.depths()[0].tolist()]
        drafted = [[self.columns.get(token, len(self.ids)) for token in tree.tokens[0].tolist()]]
        logits, rows = self.logits[:, : tree.width], range(tree.width)
        logits[0, rows, said] = 1.0
        result = verify_tree(logits, tree._replace(tokens=torch.tensor(drafted)))
        logits[0, rows, said] = 0.0
        path = result.path[0, 1 : int(result.length[0])].tolist()
        emitted = [*(int(tree.tokens[0, node]) for node in path), self.ids[int(result.next_token[0])]]
        return emitted[: len(recorded) - done]
