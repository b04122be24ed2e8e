"""Speculative generation for Hugging Face models: start reading here.

    drafter proposes a tree -> the target scores the tree in one pass -> verify picks the surviving path
    -> the cache keeps that path -> repeat

``model.generate`` prepares everything it always prepares (generation config, logits processors, stopping
criteria, inputs) and hands over to :meth:`SpeculativeGenerator._decode` through its ``custom_generate``
hook, so that every argument means here what it means there.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specfuse.acceptance import AcceptanceRule, resolve_acceptance
from specfuse.acceptance.walk import LOSSLESS, LossyWalk
from specfuse.answers import Answers
from specfuse.arguments import (
    check_arguments,
    check_config,
    check_mask,
    with_stop_strings,
    without_stop_strings,
)
from specfuse.drafters import Drafter, DraftState, resolve_drafter, root_only
from specfuse.drafters.guard import leave_out_finished, without_foreign_tokens
from specfuse.drafters.scenes import check_takes_events
from specfuse.drafters.supervised import SupervisedDrafter
from specfuse.exclusive import exclusive
from specfuse.hf.cache_names import GENERATE_CACHE, pop_cache, with_cache_name
from specfuse.hf.versions import warn_if_untested
from specfuse.pacing import Backoff
from specfuse.run import GenerationRun
from specfuse.stats import Clock, GenerationStats
from specfuse.stream import AnswerStream
from specfuse.support import PlainOnly, require_support
from specfuse.tree import TokenTree
from specfuse.tree_size import LARGEST, TreeSize, costs_of
from specfuse.video_prompt import with_video

warn_if_untested("transformers")


def generate(
    model: PreTrainedModel,
    drafter: Drafter | str | None = "auto",
    *,
    max_nodes: int | str = 32,
    graphs: bool | str = "auto",
    accept: AcceptanceRule | str = "exact",
    check: bool = True,
    seed: int | Sequence[int] | Tensor | None = None,
    draft_inputs: Mapping[str, Tensor] | None = None,
    events: Any = None,
    evidence: Sequence[Sequence[int] | None] | None = None,
    **kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """What ``model.generate(**kwargs)`` returns, in fewer passes of the model.

    Equivalent to: ``model.generate(**kwargs)`` when greedy; the same distribution when sampling.

    Args:
        model: a Hugging Face decoder-only model, e.g. ``VideoLlavaForConditionalGeneration``.
        drafter: ``"auto"`` (a :class:`CorpusDrafter` kept for this model object, together with prompt
            lookup: the more it has answered, the faster it answers), a :class:`Drafter`, or None for plain
            decoding.
        max_nodes: drafted tokens that one pass may verify per row, or ``"auto"``: up to 64, as many as pay by
            the costs of passes measured on the way, none where none do.
        graphs: whether a step on a GPU is one CUDA graph: "auto" where nothing stands in the way, True to
            insist, False never. The cache of the last call is kept for the next one then.
        accept: ``"exact"``, or a rule of :mod:`specfuse.acceptance` that keeps drafts which the target would
            not have chosen. **Rules are lossy**; the output's ``acceptance`` says so and counts such tokens.
        seed: for sampling: an int (row b uses ``seed + b``) or B ints. The same seed gives the same tokens
            with any drafter, None included. None draws one from torch's default generator.
        draft_inputs: inputs for the drafter alone (its own prompt, its own pixels), where it takes any: a row
            for each prompt, which ``num_return_sequences`` repeats, or for each answer.
        events: what an event camera saw, for a drafter that takes events (:class:`EventDrafter`): an
            EventStream, the path of an event file, a list with one for each row, or what ``see`` returned.
        check: run :func:`specfuse.check` the first time a class and configuration is met that our tests do
            not cover. A model that fails is decoded by ``model.generate``, with a warning; a drafter given as
            an object raises instead.
        evidence: per row, token ids of another model's answer to the same question, or None; a hint to
            drafters.
        **kwargs: everything ``model.generate`` takes: model inputs, ``generation_config`` and its fields,
            logits processors, stopping criteria, ``streamer``, ``tokenizer`` ...; or, instead of model
            inputs, ``video`` (a path, or frames), ``question`` and ``processor`` of a Video-LLaVA.

    Returns:
        ``[B, P + T]`` int64 sequences, or a ``GenerateDecoderOnlyOutput`` with
        ``return_dict_in_generate=True``, whose attribute ``stats`` is a :class:`GenerationStats` and whose
        ``acceptance`` is a dict: the rule, whether it is lossless, and what a lossy one cost.

    Raises:
        ValueError: an argument that can not be honoured (beams, contrastive search, ...); names it. A
            drafter's ValueError counts as that in its first two proposals (``draft_inputs`` it can not use);
            anything else it raises ends drafting for the call, is logged, and stands in
            ``stats.drafting_stopped``.
        FloatingPointError: the model's logits leave no token to choose: NaN, all -inf (also where processors
            ban every token), or +inf when sampling.
    """
    generator = SpeculativeGenerator(
        model, drafter, max_nodes=max_nodes, graphs=graphs, accept=accept, check=check
    )
    return generator.generate(
        seed=seed, draft_inputs=draft_inputs, events=events, evidence=evidence, **kwargs
    )


def custom_generate(
    drafter: Drafter | str | None = "auto",
    *,
    max_nodes: int | str = 32,
    graphs: bool | str = "auto",
    accept: AcceptanceRule | str = "exact",
    check: bool = True,
    seed: int | Sequence[int] | Tensor | None = None,
    draft_inputs: Mapping[str, Tensor] | None = None,
    events: Any = None,
    evidence: Sequence[Sequence[int] | None] | None = None,
    streamer: Any = None,
) -> Callable[..., GenerateDecoderOnlyOutput | Tensor]:
    """The one-line drop-in: ``model.generate(..., custom_generate=specfuse.custom_generate(drafter))``.

    Arguments as for :func:`generate`. Hugging Face does not hand ``streamer`` and ``tokenizer`` on to a
    callable ``custom_generate``: give the streamer here, and use :func:`generate` for stop strings.
    """

    def decode(
        model: PreTrainedModel, input_ids: Tensor, **prepared: Any
    ) -> GenerateDecoderOnlyOutput | Tensor:
        generator = SpeculativeGenerator(
            model, drafter, max_nodes=max_nodes, graphs=graphs, accept=accept, check=check
        )
        request = {"seed": seed, "draft_inputs": draft_inputs, "events": events}
        request |= {"evidence": evidence, "streamer": streamer}
        return generator._decode(model, input_ids, request, **prepared)

    return decode


class SpeculativeGenerator:
    """A model and a drafter, ready to answer; ``generate`` takes what ``model.generate`` takes.

    Threads may share one, or several with one model: their calls take turns.

    Args:
        model: the target.
        drafter, max_nodes, graphs, accept, check: as for :func:`generate`.

    Attributes:
        last_stats: :class:`GenerationStats` of the last finished call.
        last_acceptance: its ``acceptance``.
        encoded_pixels: pixels behind a prompt whose ``past_key_values`` hold them already, for draft models.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: Drafter | str | None = "auto",
        *,
        max_nodes: int | str = 32,
        graphs: bool | str = "auto",
        accept: AcceptanceRule | str = "exact",
        check: bool = True,
    ):
        if max_nodes != "auto" and not (isinstance(max_nodes, int) and 1 <= max_nodes <= 1023):
            raise ValueError(f"max_nodes must be 'auto' or an int from 1 to 1023, got {max_nodes!r}")
        if graphs != "auto" and not isinstance(graphs, bool):
            raise ValueError(f"graphs must be 'auto', True or False, got {graphs!r}")
        self.model, self.graphs, self.check = model, graphs, check
        self.named = isinstance(drafter, Drafter)
        self.drafter = resolve_drafter(drafter, model)
        self.sizes_itself = max_nodes == "auto"
        self.max_nodes = LARGEST if isinstance(max_nodes, str) else max_nodes
        self.rule = resolve_acceptance(accept, model)
        if graphs is True and self.rule is not None:
            raise ValueError(
                f"graphs=True does not go with accept={self.rule.name!r}, which decides on the host"
            )
        self.last_stats: GenerationStats | None = None
        self.last_acceptance: Mapping[str, Any] = LOSSLESS
        self.encoded_pixels: Mapping[str, Tensor] = {}
        self.plain_prompt = 0  # P of the last call that model.generate decoded

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        seed: int | Sequence[int] | Tensor | None = None,
        draft_inputs: Mapping[str, Tensor] | None = None,
        events: Any = None,
        evidence: Sequence[Sequence[int] | None] | None = None,
        **kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """See :func:`generate`."""
        check_arguments(kwargs)
        streamer = kwargs.pop("streamer", None)
        kwargs.pop("trust_remote_code", None)  # no remote code is run either way
        kwargs = with_cache_name(with_stop_strings(self.model, with_video(self.model, inputs, kwargs)))
        request = {"seed": seed, "draft_inputs": draft_inputs, "events": events}
        request |= {"evidence": evidence, "streamer": streamer, "given_cache": kwargs.get(GENERATE_CACHE)}
        # Since 5.18 the loop is handed encoded pixels only; a draft model needs the pixels themselves.
        shown = {name: x for name, x in kwargs.items() if name.startswith("pixel_values")}
        request["pixels"] = {**self.encoded_pixels, **shown}
        # By name: a class with a generate of its own (BLIP-2) begins with another argument.
        kwargs = kwargs if inputs is None else {"inputs": inputs, **kwargs}
        host = without_stop_strings(self.model)
        decode = functools.partial(_hand_over, generator=self, host=host, request=request)
        try:
            return host.generate(custom_generate=decode, **kwargs)
        except PlainOnly as reason:
            if self.named or self.rule is not None:
                raise
            return self._plain(host, kwargs, streamer, seed, reason)

    def _plain(
        self, host: PreTrainedModel, kwargs: dict[str, Any], streamer: Any, seed: Any, reason: PlainOnly
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """What ``model.generate`` gives without us, and a warning."""
        warnings.warn(f"decoding plainly with model.generate: {reason}", stacklevel=3)
        if self.encoded_pixels:
            # The cache of a session was computed for us; where a class bounds it, only that class knows how.
            pop_cache(kwargs)
            kwargs |= self.encoded_pixels
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(int(torch.as_tensor(seed).flatten()[0]))
            output = host.generate(streamer=streamer, **kwargs)
        self.plain_prompt = reason.prompt_length
        self.last_stats, self.last_acceptance = GenerationStats(drafting_stopped=str(reason)), LOSSLESS
        if not isinstance(output, Tensor):
            output.stats, output.acceptance = self.last_stats, dict(LOSSLESS)
        return output

    def stream(
        self, requests: Iterable[Mapping[str, Any] | None], *, batch_size: int = 8, partial: bool = False
    ) -> AnswerStream:
        """Answers any number of requests, ``batch_size`` at a time; a row that finishes makes room.

        Every answer is the one that :meth:`generate` gives the request alone.

            for answer in generator.stream({"id": i, **inputs[i], "max_new_tokens": 50} for i in range(999)):
                print(answer.id, tokenizer.decode(answer.tokens))

        Args:
            requests: any iterable of what :meth:`generate` would be called with, one prompt each, and an
                ``"id"`` if you like. Asked for the next one whenever a row is free, not before; None where
                there is none at the moment: the running rows go on.
            batch_size: rows that run at once.
            partial: also yield what every pass added, with ``finished`` False.

        Returns:
            An iterator over :class:`specfuse.stream.StreamedAnswer` in the order in which they finish. A
            request that fails comes out with its ``error``; the others do not notice. Closing it, or
            dropping it, ends it.

        Raises:
            ValueError: ``batch_size`` below 1, or a generator with a lossy ``accept``.
        """
        if self.rule is not None:
            raise ValueError("a stream is lossless: give it a generator without accept=...")
        return AnswerStream(self, requests, batch_size, partial)

    def _decode(
        self, model: PreTrainedModel, input_ids: Tensor, request: Mapping[str, Any], **prepared: Any
    ) -> GenerateDecoderOnlyOutput | Tensor:
        # Threads that share a model take turns, call by call.
        with exclusive(model), torch.no_grad():
            return self._loop(model, input_ids, request, **prepared)

    def _started(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        request: Mapping[str, Any],
        stats: GenerationStats,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> GenerationRun:
        check_config(generation_config)
        check_mask(model_kwargs.get("attention_mask"))
        nodes = self.max_nodes if self.drafter is not None else 0
        require_support(model, input_ids, generation_config, model_kwargs, nodes, self.check)
        check_takes_events(self.drafter, request["events"])
        answers = Answers(input_ids, stopping_criteria, generation_config, request["streamer"])
        run = GenerationRun(
            model, answers, generation_config, logits_processor, model_kwargs, request, self.max_nodes
        )
        run.drafter = run.state.memory[id(self)] = SupervisedDrafter(self.drafter, stats)
        run.target.keeps_states = run.drafter.needs_target
        return run

    def _loop(
        self, model: PreTrainedModel, input_ids: Tensor, request: Mapping[str, Any], **prepared: Any
    ) -> GenerateDecoderOnlyOutput | Tensor:
        clock, stats = Clock(), GenerationStats()
        run = self._started(model, input_ids, request, stats, **prepared)
        # A rule decides on the host, between passes.
        run.use_graphs(self.graphs if self.rule is None else False)
        pace = self._pace(input_ids)
        walk = None if self.rule is None else LossyWalk(self.rule, run, self.drafter)

        tree = self._first_tree(run.state, pace)
        stats.draft_ms += clock.lap()
        tree, verified, committed = run.first_step(tree)
        stats.prefill_ms += clock.lap()
        while True:
            kept = run.emit(tree, verified, *committed, stats)
            run.commit(verified, kept)
            stats.commit_ms += clock.lap()
            if not any(run.state.active):
                break
            if pace.asked:
                accepted = [length - 1 for length in committed[1] if length]
                pace.learn(sum(accepted), tree.width - 1, len(accepted), stats)
            tree = self._propose(run.state, pace)
            stats.draft_ms += clock.lap()
            tree, verified, committed = run.step(tree)
            stats.verify_ms += clock.lap()
        self._learn(run.state)
        stats.commit_ms += clock.lap()
        self.last_stats, self.last_acceptance = stats, LOSSLESS if walk is None else walk.label()
        output = run.result(stats)
        if not isinstance(output, Tensor):
            output.acceptance = dict(self.last_acceptance)
        return output

    def _first_tree(self, state: DraftState, pace: Backoff) -> TokenTree:
        drafter: SupervisedDrafter = state.memory[id(self)]
        drafter.begin(state)
        return self._propose(state, pace) if drafter.drafts_first else root_only(state)

    def _propose(self, state: DraftState, pace: Backoff) -> TokenTree:
        drafter: SupervisedDrafter = state.memory[id(self)]
        if not drafter.enabled or max(state.remaining, default=0) <= 1 or pace.rests():
            return leave_out_finished(root_only(state), state)
        tree = drafter.propose(state, self.max_nodes)
        return leave_out_finished(pace.trim(without_foreign_tokens(tree, state)), state)

    def _pace(self, input_ids: Tensor) -> Backoff:
        if self.drafter is None or not self.sizes_itself:
            return Backoff()
        size = TreeSize(costs_of(self.model, self.drafter, *input_ids.shape), input_ids.shape[1])
        size.first = self.drafter.drafts_first
        return size

    def _learn(self, state: DraftState) -> None:
        state.memory[id(self)].learn(state)


def _hand_over(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    generator: SpeculativeGenerator,
    host: PreTrainedModel,
    request: Mapping[str, Any],
    **prepared: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    # What prepares may be a copy, or hold the model that decodes (PEFT, BLIP-2).
    model = generator.model if model is host else model
    return generator._decode(model, input_ids, request, **prepared)
