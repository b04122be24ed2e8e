"""Speculative generation for Hugging Face models: start reading here.

    drafter proposes a tree -> the target scores the tree in one pass -> verify picks the surviving path
    -> the cache keeps that path -> repeat

``model.generate`` prepares everything it always prepares (generation config, logits processors, stopping criteria,
inputs) and hands over to :meth:`SpeculativeGenerator._decode` through its ``custom_generate`` hook, so that every
argument means here what it means there.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specfuse.answers import Answers
from specfuse.drafters import Drafter, DraftState, resolve_drafter, root_only
from specfuse.stats import GenerationStats
from specfuse.support import check_arguments, check_config
from specfuse.tree import TokenTree
from specfuse.tree_forward import MAX_MASKED_PREFILL, TreeForward
from specfuse.verify import TokenChoice, Verified, check_distributions, verify

# Slots reserved for the answer at first; longer answers grow the cache by doubling.
_RESERVED_ANSWER = 1024


def generate(
    model: PreTrainedModel,
    drafter: Drafter | str | None = "auto",
    *,
    max_nodes: int = 32,
    seed: int | Sequence[int] | Tensor | None = None,
    draft_inputs: Mapping[str, Tensor] | None = None,
    evidence: Sequence[Sequence[int] | None] | None = None,
    **kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """What ``model.generate(**kwargs)`` returns, in fewer passes of the model.

    Equivalent to: ``model.generate(**kwargs)`` when greedy; the same distribution when sampling.

    Args:
        model: a Hugging Face decoder-only model, e.g. ``VideoLlavaForConditionalGeneration``.
        drafter: ``"auto"`` (a :class:`CorpusDrafter` kept for this model object, together with prompt lookup: the
            more it has answered, the faster it answers), a :class:`Drafter`, or None for plain decoding.
        max_nodes: drafted tokens that one pass may verify per row.
        seed: for sampling: an int (row b uses ``seed + b``) or B ints. The same seed gives the same tokens with any
            drafter, None included. None draws one from torch's default generator.
        draft_inputs: inputs for the drafter alone (its own prompt, its own pixels), where it takes any.
        evidence: per row, token ids of another model's answer to the same question, or None; a hint to drafters.
        **kwargs: everything ``model.generate`` takes: model inputs, ``generation_config`` and its fields, logits
            processors, stopping criteria, ``streamer``, ``tokenizer`` ...

    Returns:
        ``[B, P + T]`` int64 sequences, or a ``GenerateDecoderOnlyOutput`` with ``return_dict_in_generate=True``,
        whose attribute ``stats`` is a :class:`GenerationStats`.

    Raises:
        ValueError: an argument that can not be honoured (beams, contrastive search, ...); names it.
        FloatingPointError: the model's logits leave no token to choose (NaN).
    """
    generator = SpeculativeGenerator(model, drafter, max_nodes=max_nodes)
    return generator.generate(seed=seed, draft_inputs=draft_inputs, evidence=evidence, **kwargs)


def custom_generate(
    drafter: Drafter | str | None = "auto",
    *,
    max_nodes: int = 32,
    seed: int | Sequence[int] | Tensor | None = None,
    draft_inputs: Mapping[str, Tensor] | None = None,
    evidence: Sequence[Sequence[int] | None] | None = None,
    streamer: Any = None,
) -> Callable[..., GenerateDecoderOnlyOutput | Tensor]:
    """The one-line drop-in: ``model.generate(..., custom_generate=specfuse.custom_generate(drafter))``.

    Arguments as for :func:`generate`. Hugging Face does not hand ``streamer`` and ``tokenizer`` on to a callable
    ``custom_generate``: give the streamer here, and use :func:`generate` for stop strings.
    """

    def decode(model: PreTrainedModel, input_ids: Tensor, **prepared: Any):
        generator = SpeculativeGenerator(model, drafter, max_nodes=max_nodes)
        request = {"seed": seed, "draft_inputs": draft_inputs, "evidence": evidence, "streamer": streamer}
        return generator._decode(model, input_ids, request, **prepared)

    return decode


class SpeculativeGenerator:
    """A model and a drafter, ready to answer; ``generate`` takes what ``model.generate`` takes.

    Args:
        model: the target.
        drafter, max_nodes: as for :func:`generate`.

    Attributes:
        last_stats: :class:`GenerationStats` of the last finished call.
    """

    def __init__(
        self, model: PreTrainedModel, drafter: Drafter | str | None = "auto", *, max_nodes: int = 32
    ):
        if not isinstance(max_nodes, int) or not 1 <= max_nodes <= 1023:
            raise ValueError(f"max_nodes must be an int from 1 to 1023, got {max_nodes!r}")
        self.model = model
        self.drafter = resolve_drafter(drafter, model)
        self.max_nodes = max_nodes
        self.last_stats: GenerationStats | None = None

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        seed: int | Sequence[int] | Tensor | None = None,
        draft_inputs: Mapping[str, Tensor] | None = None,
        evidence: Sequence[Sequence[int] | None] | None = None,
        **kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """See :func:`generate`."""
        check_arguments(kwargs)
        streamer = kwargs.pop("streamer", None)
        kwargs = _with_stop_strings(self.model, kwargs)
        request = {"seed": seed, "draft_inputs": draft_inputs, "evidence": evidence, "streamer": streamer}
        decode = functools.partial(_hand_over, generator=self, request=request)
        return self.model.generate(inputs, custom_generate=decode, **kwargs)

    @torch.no_grad()
    def _decode(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        request: Mapping[str, Any],
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        check_config(generation_config)
        clock, stats = _Clock(), GenerationStats()
        answers = Answers(input_ids, stopping_criteria, generation_config, request["streamer"])
        run = _Run(model, answers, generation_config, logits_processor, model_kwargs, request, self.max_nodes)
        drafts_first = self.drafter is not None and not self.drafter.needs_target

        tree = self._propose(run.state) if drafts_first else root_only(run.state)
        stats.draft_ms += clock.lap()
        logits, tree = run.prefill(tree)
        verified = verify(logits, tree, run.choice, run.root_positions, run.sequences())
        committed = run.read(verified)
        stats.prefill_ms += clock.lap()
        while True:
            kept = run.emit(tree, verified, *committed, stats)
            run.target.commit(verified.accepted.path, verified.accepted.length, kept)
            stats.commit_ms += clock.lap()
            if not any(answers.running):
                break
            tree = self._propose(run.state)
            stats.draft_ms += clock.lap()
            positions = run.root_positions
            logits = run.target.forward_tree(tree, positions)
            verified = verify(logits, tree, run.choice, positions, run.sequences())
            committed = run.read(verified)
            stats.verify_ms += clock.lap()
        self._learn(run.state)
        stats.commit_ms += clock.lap()
        self.last_stats = stats
        return run.result(stats)

    def _propose(self, state: DraftState) -> TokenTree:
        if self.drafter is None or max(state.remaining, default=0) <= 1:
            return _leave_out_finished(root_only(state), state)
        tree = self.drafter.propose(state, self.max_nodes)
        return _leave_out_finished(_without_foreign_tokens(tree, state), state)

    def _learn(self, state: DraftState) -> None:
        if self.drafter is not None:
            for row, answer in enumerate(state.answers):
                self.drafter.observe(answer, question=state.question(row))


class _Run:
    """The parts of one call: the target with its cache, the rows, how tokens are chosen."""

    def __init__(
        self,
        model: PreTrainedModel,
        answers: Answers,
        config: GenerationConfig,
        processors: LogitsProcessorList,
        model_kwargs: dict[str, Any],
        request: Mapping[str, Any],
        max_nodes: int,
    ):
        self.model, self.answers, self.config = model, answers, config
        self.past = model_kwargs.pop("past_key_values", None)
        self.prompt_mask = model_kwargs.pop("attention_mask", None)
        for handled in ("use_cache", "logits_to_keep"):
            model_kwargs.pop(handled, None)
        self.inputs = {"input_ids": answers.input_ids, **model_kwargs}
        embeds = model_kwargs.get("inputs_embeds")
        self.prompt_length = answers.input_ids.shape[1] if embeds is None else embeds.shape[1]
        batch = answers.input_ids.shape[0]
        longest = max(answers.remaining(), default=0)
        capacity = self.prompt_length + min(longest, _RESERVED_ANSWER) + max_nodes + 1
        last_position = self.prompt_length + longest - 1
        self.target = TreeForward(model, batch, capacity, max_position=last_position)
        seeds = _row_seeds(request["seed"], batch, config.do_sample).to(model.device)
        self.choice = TokenChoice.from_config(processors, config, seeds, batch)
        self.state = self._draft_state(request)
        self.scores: list[list[Tensor]] = [[] for _ in range(batch)]
        self.logits: list[list[Tensor]] = [[] for _ in range(batch)]
        # Noise and rotary positions count real tokens only, so that padding changes nothing.
        if self.prompt_mask is None:
            first_root = torch.full((batch,), self.prompt_length - 1, dtype=torch.int64)
        else:
            first_root = self.prompt_mask.sum(dim=1).to("cpu", torch.int64) - 1
        self._first_root = first_root

    def _draft_state(self, request: Mapping[str, Any]) -> DraftState:
        prompts = self.answers.prompts
        if self.prompt_mask is not None and self.inputs.get("inputs_embeds") is None:
            rows = zip(prompts, self.prompt_mask.tolist(), strict=True)
            prompts = [[t for t, kept in zip(ids, mask, strict=True) if kept] for ids, mask in rows]
        return DraftState(
            prompts=prompts,
            answers=self.answers.answers,
            active=self.answers.running,
            remaining=self.answers.remaining(),
            visual_token_ids=visual_token_ids(self.model),
            inputs={**self.inputs, "attention_mask": self.prompt_mask},
            draft_inputs=request["draft_inputs"],
            vocab_size=self.model.config.get_text_config(decoder=True).vocab_size,
            evidence=request["evidence"],
            choice=self.choice,
        )

    @property
    def root_positions(self) -> Tensor:
        """[B] absolute position of each row's last committed token."""
        return self._first_root + torch.tensor([len(answer) for answer in self.answers.answers])

    def sequences(self) -> list[list[int]]:
        if self.choice.processors is None:
            return []
        return [self.answers.sequence(row) for row in range(len(self.answers.prompts))]

    def prefill(self, tree: TokenTree) -> tuple[Tensor, TokenTree]:
        """The first pass; returns the logits and the tree it carried."""
        if tree.width > 1 and self.prompt_length + tree.width > MAX_MASKED_PREFILL:
            tree = _leave_out_finished(root_only(self.state), self.state)
        logits = self.target.prefill(
            self.inputs, self.prompt_mask, tree if tree.width > 1 else None, self.past
        )
        return logits, tree

    def read(self, verified: Verified) -> tuple[list[list[int]], list[int], list[int]]:
        """Brings the decision to the host: paths, lengths, next tokens."""
        accepted = verified.accepted
        if accepted.path.is_cpu:
            paths, lengths = accepted.path.tolist(), accepted.length.tolist()
            next_tokens = accepted.next_token.tolist()
        else:
            # One transfer, and so one wait for the device.
            columns = [accepted.path.long(), accepted.length.long()[:, None], accepted.next_token[:, None]]
            packed = torch.cat(columns, dim=1).tolist()
            paths, lengths, next_tokens = packed, [row[-2] for row in packed], [row[-1] for row in packed]
        check_distributions(next_tokens, lengths)
        return [row[:length] for row, length in zip(paths, lengths, strict=True)], lengths, next_tokens

    def emit(
        self,
        tree: TokenTree,
        verified: Verified,
        paths: list[list[int]],
        lengths: list[int],
        next_tokens: list[int],
        stats: GenerationStats,
    ) -> list[int]:
        """Appends what the pass decided to every row; returns how many tokens each row kept."""
        tokens, drafted = tree.tokens.tolist(), tree.num_nodes.tolist()
        added, running, width = [0] * len(paths), self.answers.running, self.answers.width
        for row, (path, length) in enumerate(zip(paths, lengths, strict=True)):
            if not length or not running[row]:
                continue
            emitted = [*(tokens[row][node] for node in path[1:]), next_tokens[row]]
            kept = added[row] = self.answers.append(row, emitted, width)
            stats.count(kept, drafted[row] - 1)
            if verified.scores is not None:
                self.scores[row] += verified.scores[row][:kept]
            if verified.logits is not None:
                self.logits[row] += verified.logits[row][:kept]
        self.answers.stream()
        self.state.active = self.answers.running
        self.state.remaining = self.answers.remaining()
        return added

    def result(self, stats: GenerationStats) -> GenerateDecoderOnlyOutput | Tensor:
        if self.answers.streamer is not None:
            self.answers.streamer.end()
        sequences = self.answers.sequences()
        if not self.config.return_dict_in_generate:
            return sequences
        output = GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self._columns(self.scores, padding=True) if self.choice.keep_scores else None,
            logits=self._columns(self.logits, padding=False) if self.choice.keep_logits else None,
            past_key_values=self.target.cache.to_dynamic(self.prompt_length + self.answers.width - 1),
        )
        output.stats = stats
        return output

    def _columns(self, rows: list[list[Tensor]], padding: bool) -> tuple[Tensor, ...]:
        """Per-row lists -> a tuple of [B, V], one per emitted column. A finished row's filler is the certain pad."""
        example = next(row[0] for row in rows if row)
        filler = torch.zeros_like(example)
        if padding:
            filler = torch.full_like(example, -float("inf"))
            filler[self.answers.pad] = 0.0
        return tuple(
            torch.stack([row[column] if column < len(row) else filler for row in rows])
            for column in range(self.answers.width)
        )


class _Clock:
    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Milliseconds since the last lap."""
        now = time.perf_counter()
        elapsed, self.last = (now - self.last) * 1e3, now
        return elapsed


def visual_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Ids that stand for pixels in a prompt (``image_token_id``, ``video_token_id`` of the config)."""
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    found = {getattr(model.config, name, None) for name in names}
    return frozenset(token for token in found if isinstance(token, int))


def _hand_over(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    generator: SpeculativeGenerator,
    request: Mapping[str, Any],
    **prepared: Any,
):
    return generator._decode(model, input_ids, request, **prepared)


def _with_stop_strings(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Turns stop strings into a criterion: Hugging Face keeps the tokenizer from a custom decoding loop."""
    tokenizer = kwargs.pop("tokenizer", None)
    config = kwargs.get("generation_config") or model.generation_config
    stop_strings = kwargs.pop("stop_strings", None) or config.stop_strings
    if stop_strings is None:
        return kwargs
    if tokenizer is None:
        raise ValueError(f"stop_strings={stop_strings!r} needs the model's tokenizer: pass tokenizer=...")
    if config.stop_strings is not None:
        kwargs["generation_config"] = copy.deepcopy(config)
        kwargs["generation_config"].stop_strings = None
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(stop_strings=stop_strings, tokenizer=tokenizer))
    return {**kwargs, "stopping_criteria": criteria}


def _row_seeds(seed: int | Sequence[int] | Tensor | None, batch: int, do_sample: bool) -> Tensor:
    if seed is None:
        if not do_sample:
            return torch.zeros(batch, dtype=torch.int64)
        seed = int(torch.randint(2**62, ()))
    if isinstance(seed, int):
        return torch.arange(batch, dtype=torch.int64) + seed
    seeds = torch.as_tensor(seed, dtype=torch.int64).cpu()
    if tuple(seeds.shape) != (batch,):
        raise ValueError(f"seed must be an int or {batch} ints (one per row), got shape {tuple(seeds.shape)}")
    return seeds


def _leave_out_finished(tree: TokenTree, state: DraftState) -> TokenTree:
    if all(state.active):
        return tree
    keep = torch.tensor(state.active, dtype=torch.int32)
    return tree._replace(num_nodes=tree.num_nodes * keep)


def _without_foreign_tokens(tree: TokenTree, state: DraftState) -> TokenTree:
    """Drops nodes the target has no embedding for, and placeholders that would ask it for pixels."""
    limit = state.vocab_size if state.vocab_size is not None else 2**62
    drafts = tree.tokens[:, 1:]
    foreign = (drafts < 0) | (drafts >= limit)
    for token in state.visual_token_ids:
        foreign |= drafts == token
    if not bool(foreign.any()):
        return tree
    rows = []
    for tokens, parents, count in zip(
        tree.tokens.tolist(), tree.parents.tolist(), tree.num_nodes.tolist(), strict=True
    ):
        kept: dict[int, int] = {0: 0}
        row, row_parents = [tokens[0]], [-1]
        for node in range(1, count):
            bad = not 0 <= tokens[node] < limit or tokens[node] in state.visual_token_ids
            if not bad and parents[node] in kept:
                kept[node] = len(row)
                row.append(tokens[node])
                row_parents.append(kept[parents[node]])
        rows.append((row, row_parents))
    return TokenTree.from_parents([row for row, _ in rows], [parents for _, parents in rows])
