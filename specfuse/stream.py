"""Many requests through one batch: a row that finishes leaves, the next request takes its place.

    a row is free -> its request is prefilled alone, its KV joins the pool
    every running row proposes a tree -> one pass over all of them -> each row is decided and emitted
    -> finished rows leave -> repeat

Each row is a GenerationRun of its own: sampling settings, stopping criteria, drafter state and streamer are
those of its request, and noise depends on its seed and position only.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specfuse.drafters import root_only
from specfuse.drafters.guard import without_foreign_tokens
from specfuse.exclusive import exclusive
from specfuse.ops.verify_tree import AcceptedPath
from specfuse.pacing import Backoff
from specfuse.passes.kv_cache import TreeCache
from specfuse.passes.out_of_memory import is_out_of_memory
from specfuse.passes.row_pool import RowPool
from specfuse.passes.shared_prefix import SharedPrefix
from specfuse.run import GenerationRun, on_host
from specfuse.stats import Clock, GenerationStats
from specfuse.tree import TokenTree
from specfuse.tree_size import TreeSize, costs_of
from specfuse.verify import TokenChoice, Verified, check_distributions, verify

if TYPE_CHECKING:
    from specfuse.generate import SpeculativeGenerator


@dataclass
class StreamedAnswer:
    """What came of one request.

    Attributes:
        id: the request's ``"id"``, or its place in the iterable.
        tokens: emitted so far, end-of-sequence included.
        sequences: ``[1, P + T]`` int64, what ``generate`` returns; None until it is finished.
        stats: of this request alone. Passes are shared: ``verify_ms`` is the time of those it took part in.
        finished: False for an update (``partial=True``).
        error: what went wrong with this request, or None.
    """

    id: Any
    tokens: list[int] = field(default_factory=list)
    sequences: Tensor | None = None
    stats: GenerationStats = field(default_factory=GenerationStats)
    finished: bool = True
    error: Exception | None = None


@dataclass
class _Row:
    """A running request."""

    id: Any
    run: GenerationRun
    stats: GenerationStats

    @property
    def done(self) -> bool:
        return not any(self.run.state.active)

    def answer(self, error: Exception | None = None) -> StreamedAnswer:
        tokens, finished = list(self.run.answers.answers[0]), self.done or error is not None
        sequences = self.run.answers.sequences() if self.done and error is None else None
        return StreamedAnswer(self.id, tokens, sequences, self.stats, finished, error)


class AnswerStream:
    """The iterator that ``SpeculativeGenerator.stream`` returns.

    Args:
        generator: whose model and drafter answer.
        requests, batch_size, partial: as for ``SpeculativeGenerator.stream``.
        prefix: KV that all prompts begin with and that their ``past_key_values`` hold, kept once.

    Attributes:
        stats: of the shared passes: their times, and their tokens over all rows.
        pool: the running rows' cache.
    """

    def __init__(
        self,
        generator: SpeculativeGenerator,
        requests: Iterable[Mapping[str, Any] | None],
        batch_size: int = 8,
        partial: bool = False,
        prefix: SharedPrefix | None = None,
    ):
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
        self.generator, self.batch_size, self.partial = generator, batch_size, partial
        # Prepares requests the way generate does, and begins them instead of finishing them.
        self.admitting: Any = copy.copy(generator)
        self.admitting.__dict__["_decode"] = self._begin
        self.model, self.max_nodes = generator.model, generator.max_nodes
        self.pool = RowPool(self.model, batch_size, prefix)
        self.rows: list[_Row] = []
        self.stats = GenerationStats()
        self.pace = self._pace()
        self._choice: TokenChoice | None = None
        self._seen = (0, 0)  # accepted drafts of the last pass, and its rows
        self._answers = self._run(iter(requests))

    def __iter__(self) -> Iterator[StreamedAnswer]:
        return self

    def __next__(self) -> StreamedAnswer:
        return next(self._answers)

    def close(self) -> None:
        """Ends it; running requests are dropped."""
        self._answers.close()

    def _run(self, requests: Iterator[Mapping[str, Any] | None]) -> Generator[StreamedAnswer, None, None]:
        position, more = 0, True
        try:
            while more or self.rows:
                while more and len(self.rows) < self.batch_size:
                    try:
                        request = next(requests)
                    except StopIteration:
                        more = False
                        break
                    if request is None:
                        break
                    yield from self._admit(request, position)
                    position += 1
                if self.rows:
                    yield from self._step()
        finally:
            self.rows.clear()
            self.pool = RowPool(self.model, 0)

    def _pace(self) -> Backoff:
        drafter = self.generator.drafter
        if drafter is None or not self.generator.sizes_itself:
            return Backoff()
        size = TreeSize(costs_of(self.model, drafter, self.batch_size, 0), 0)
        size.first = False
        return size

    # ---------------------------------------------------------------- a request joins

    def _admit(self, request: Mapping[str, Any], position: int) -> Iterator[StreamedAnswer]:
        name: Any = position
        try:
            if not isinstance(request, Mapping):
                raise ValueError(f"requests must be mappings of arguments, got {type(request).__name__}")
            arguments = dict(request)
            name = arguments.pop("id", position)
            row = self.admitting.generate(**arguments)
        except Exception as error:
            yield StreamedAnswer(name, error=error)
            return
        if not isinstance(row, _Row):  # only model.generate decodes this one rightly
            tokens = row[0, self.admitting.plain_prompt :].tolist()
            yield StreamedAnswer(name, tokens, row, self.admitting.last_stats)
            return
        row.id = name
        if row.done:
            yield self._finished(row)
            return
        self.rows.append(row)
        self._choice = None
        if self.partial:
            yield row.answer()

    def _begin(
        self, model: PreTrainedModel, input_ids: Tensor, request: Mapping[str, Any], **prepared: Any
    ) -> _Row:
        """The first pass of one request, alone; its row joins the pool unless that was all."""
        if input_ids.shape[0] != 1:
            raise ValueError(f"a request of a stream has one row, got {input_ids.shape[0]}: split it")
        if prepared["generation_config"].return_dict_in_generate:
            raise ValueError("return_dict_in_generate=True is not supported in a stream")
        clock, stats = Clock(), GenerationStats()
        with exclusive(model), torch.no_grad():
            run = self.generator._started(model, input_ids, request, stats, **prepared)
            tree = self.generator._first_tree(run.state, Backoff())
            stats.draft_ms += clock.lap()
            tree, verified, committed = run.first_step(tree)
            stats.prefill_ms += clock.lap()
            kept = run.emit(tree, verified, *committed, stats)
            row = _Row(None, run, stats)
            if not row.done:
                run.commit(verified, kept)
                self.pool.join(run.target, int(run.root_ids[0]))
                self.pool.keeps_states |= run.target.keeps_states
            run.target.cache = TreeCache(0, 1, 0)  # its KV lies in the pool
        return row

    def _finished(self, row: _Row) -> StreamedAnswer:
        self.generator._learn(row.run.state)
        if row.run.answers.streamer is not None:
            row.run.answers.streamer.end()
        return row.answer()

    # ---------------------------------------------------------------- a pass over all rows

    def _step(self) -> Iterator[StreamedAnswer]:
        clock = Clock()
        errors: dict[int, Exception] = {}  # by place
        with exclusive(self.model), torch.no_grad():
            tree = self._propose(errors)
            draft_ms = clock.lap()
            positions = torch.cat([row.run.root_positions for row in self.rows])
            logits, tree = self._score(tree)
            accepted = self._decide(logits, tree, positions, errors)
            verify_ms = clock.lap()
            kept = self._emit(tree, accepted, errors)
            self.pool.commit(accepted.path, accepted.length, kept)
        commit_ms = clock.lap()
        for stats in (self.stats, *(row.stats for row in self.rows)):
            stats.draft_ms += draft_ms
            stats.verify_ms += verify_ms
            stats.commit_ms += commit_ms
        if self.pace.asked:
            drafts, rows = self._seen
            self.pace.learn(drafts, tree.width - 1, rows, self.stats)
        ended, updates = self._leave(errors), []
        if self.partial:
            updates = [row.answer() for row in self.rows]
        yield from ended
        yield from updates

    def _propose(self, errors: dict[int, Exception]) -> TokenTree:
        rests = self.pace.rests()
        trees = []
        for place, row in enumerate(self.rows):
            state, drafter = row.run.state, row.run.drafter
            tree = None
            if drafter is not None and drafter.enabled and not rests and state.remaining[0] > 1:
                try:
                    tree = without_foreign_tokens(drafter.propose(state, self.max_nodes), state)
                except ValueError as error:  # the request's own arguments
                    errors[place] = error
            trees.append(root_only(state) if tree is None else tree)
        return self.pace.trim(stacked(trees))

    def _score(self, tree: TokenTree) -> tuple[Tensor, TokenTree]:
        """Logits of all rows' nodes, and the tree scored: the roots alone where memory ran out."""
        ids = torch.cat([row.run.root_ids for row in self.rows])
        try:
            return self.pool.forward_tree(tree, ids), tree
        except (RuntimeError, MemoryError) as error:
            if tree.width == 1 or not is_out_of_memory(error):
                raise
            for row in self.rows:
                if row.run.drafter is not None:
                    row.run.drafter.stop(f"memory ran out in a pass over {tree.width} nodes a row")
        self.pool.cache.set_lengths(self.pool.cache.lengths)
        roots = stacked([root_only(row.run.state) for row in self.rows])
        return self.pool.forward_tree(roots, ids), roots

    def _decide(
        self, logits: Tensor, tree: TokenTree, positions: Tensor, errors: dict[int, Exception]
    ) -> AcceptedPath:
        """What was accepted; length 0 in rows where deciding failed."""
        if all(row.run.choice.processors is None for row in self.rows):
            return verify(logits, tree, self._joint_choice(), positions, []).accepted
        found = []
        for i, row in enumerate(self.rows):
            one, sequences = slice(i, i + 1), row.run.sequences()
            try:
                decided = verify(logits[one], tree.rows(one), row.run.choice, positions[one], sequences)
                found.append(decided.accepted)
            except Exception as error:
                errors.setdefault(i, error)
                nothing = logits.new_full((1, tree.width), -1)
                found.append(
                    AcceptedPath(
                        nothing.int(), nothing[:, 0].int() + 1, nothing[:, 0].long(), nothing.float()
                    )
                )
        return AcceptedPath(*(torch.cat(values) for values in zip(*found, strict=True)))

    def _joint_choice(self) -> TokenChoice:
        """All rows' settings as one, made anew when rows come or go."""
        if self._choice is None:
            choices = [row.run.choice for row in self.rows]
            seeds = torch.cat([choice.seeds for choice in choices])
            self._choice = TokenChoice(None, 0.0, 0, 1.0, 0.0, seeds)
            self._choice.rules = tuple(
                torch.cat(rules) for rules in zip(*(choice.rules for choice in choices), strict=True)
            )
        return self._choice

    def _emit(self, tree: TokenTree, accepted: AcceptedPath, errors: dict[int, Exception]) -> list[int]:
        """Appends to every row what was decided; returns how many tokens each kept."""
        kept, drafts, rows = [0] * len(self.rows), 0, 0
        decided = zip(*on_host(accepted), strict=True)
        for i, (row, (path, length, following)) in enumerate(zip(self.rows, decided, strict=True)):
            if i in errors:
                continue
            run, verified = row.run, Verified(accepted, None, None)
            try:
                check_distributions([following], [length])
                if self.pool.states is not None and run.target.keeps_states:
                    run.target.states = self.pool.states[i : i + 1]
                    verified = Verified(AcceptedPath(*(values[i : i + 1] for values in accepted)), None, None)
                committed = ([path[:length]], [length], [following])
                kept[i] = run.emit(tree.rows(slice(i, i + 1)), verified, *committed, row.stats)[0]
                self.stats.count(kept[i], int(tree.num_nodes[i]) - 1, length - 1)
            except Exception as error:
                errors[i] = error
            drafts, rows = drafts + length - 1, rows + 1
        self._seen = drafts, rows
        return kept

    def _leave(self, errors: dict[int, Exception]) -> list[StreamedAnswer]:
        ended = []
        # From the end: the last row takes the place of one that leaves, and it stays.
        for place in reversed(range(len(self.rows))):
            row, error = self.rows[place], errors.get(place)
            if not row.done and error is None:
                continue
            ended.append(self._finished(row) if error is None else row.answer(error))
            self.pool.leave(place, wipe=error is not None)
            self.rows[place] = self.rows[-1]
            self.rows.pop()
            self._choice = None
        return ended[::-1]


def stacked(trees: list[TokenTree]) -> TokenTree:
    """Trees of one row each as one batch; probabilities are kept where every drafted tree has some."""
    width = max(tree.width for tree in trees)
    tokens = torch.zeros((len(trees), width), dtype=torch.int64)
    parents = torch.full((len(trees), width), -1, dtype=torch.int32)
    probs = None
    if all(tree.probs is not None or tree.width == 1 for tree in trees):
        probs = torch.zeros((len(trees), width), dtype=torch.float32)
    for i, tree in enumerate(trees):
        tokens[i, : tree.width] = tree.tokens[0]
        parents[i, : tree.width] = tree.parents[0]
        if probs is not None:
            probs[i, : tree.width] = 1.0 if tree.probs is None else tree.probs[0]
    return TokenTree(tokens, parents, torch.cat([tree.num_nodes for tree in trees]), probs)
