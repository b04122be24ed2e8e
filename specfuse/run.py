"""One call of the generation loop: the target with its cache, the rows, how tokens are chosen, the result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specfuse.answers import Answers
from specfuse.arguments import row_seeds
from specfuse.drafters import DraftState, root_only
from specfuse.drafters.guard import leave_out_finished
from specfuse.drafters.scenes import rows_of_events
from specfuse.drafters.supervised import SupervisedDrafter
from specfuse.hf.cache_names import GENERATE_CACHE, pop_cache
from specfuse.ops.verify_tree import AcceptedPath
from specfuse.passes.carried_rows import CarriedRows
from specfuse.passes.out_of_memory import is_out_of_memory
from specfuse.passes.step_graph import GraphedSteps, graphs_of
from specfuse.passes.tree_forward import MAX_MASKED_PREFILL, TreeForward
from specfuse.stats import GenerationStats
from specfuse.support import is_tested
from specfuse.tree import TokenTree
from specfuse.verify import TokenChoice, Verified, check_distributions, verify

# Slots reserved for the answer at first; longer answers grow the cache by doubling.
RESERVED_ANSWER = 1024

Committed = tuple[list[list[int]], list[int], list[int]]
"""A pass on the host: per row the visited nodes, how many they are, and the token behind them."""


class GenerationRun:
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
        self.past = pop_cache(model_kwargs)
        self.given = request.get("given_cache")  # the caller's, which is filled as model.generate fills it
        self.prompt_mask = model_kwargs.pop("attention_mask", None)
        for handled in ("use_cache", "logits_to_keep"):
            model_kwargs.pop(handled, None)
        self.inputs = {"input_ids": answers.input_ids, **model_kwargs}
        # An untested class may build a mask of its own from pixels (image spans that attend both ways).
        more = model_kwargs.keys() - {"position_ids", "inputs_embeds"}
        self.own_prompt_mask = any(model_kwargs[name] is not None for name in more) and not is_tested(model)
        embeds = model_kwargs.get("inputs_embeds")
        self.prompt_length = answers.input_ids.shape[1] if embeds is None else embeds.shape[1]
        batch = answers.input_ids.shape[0]
        longest = max(answers.remaining(), default=0)
        capacity = self.prompt_length + min(longest, RESERVED_ANSWER) + max_nodes + 1
        # Noise counts real tokens only: padding changes nothing. The model gets the caller's positions.
        if self.prompt_mask is None:
            self._first_root = torch.full((batch,), self.prompt_length - 1, dtype=torch.int64)
        else:
            self._first_root = self.prompt_mask.sum(dim=1).to("cpu", torch.int64) - 1
        given = model_kwargs.get("position_ids")
        if given is not None and given.dim() != 2:
            raise ValueError(
                f"model {type(model).__name__}: position_ids must be [B, {self.prompt_length}], got "
                f"{tuple(given.shape)}; models with positions of several axes (M-RoPE) are not supported "
                "yet, use model.generate"
            )
        self._first_id = self._first_root if given is None else given[..., -1].to("cpu").expand(batch)
        last_id = int(self._first_id.max()) + longest if batch else 0
        self._new_target = functools.partial(TreeForward, model, batch, capacity, max_position=last_id)
        self.target = self._new_target()
        self.drafter: SupervisedDrafter | None = None
        seeds = row_seeds(request["seed"], batch, config.do_sample).to(model.device)
        self.choice = TokenChoice.from_config(processors, config, seeds, batch)
        self.state = self._draft_state(request)
        self.graphed: GraphedSteps | None = None
        self.verify: Callable[..., Verified] = verify
        self.carried = CarriedRows(batch)
        self.scores: list[list[Tensor]] = [[] for _ in range(batch)]
        self.logits: list[list[Tensor]] = [[] for _ in range(batch)]

    def _draft_state(self, request: Mapping[str, Any]) -> DraftState:
        prompts = self.answers.prompts
        if self.prompt_mask is not None and self.inputs.get("inputs_embeds") is None:
            rows = zip(prompts, self.prompt_mask.tolist(), strict=True)
            prompts = [[t for t, kept in zip(ids, mask, strict=True) if kept] for ids, mask in rows]
        copies = self.config.num_return_sequences or 1
        events = rows_of_events(request["events"], len(prompts), copies)
        return DraftState(
            prompts=prompts,
            answers=self.answers.answers,
            active=self.answers.running,
            remaining=self.answers.remaining(),
            visual_token_ids=visual_token_ids(self.model),
            inputs=self._inputs_for_drafters(request.get("pixels", {})),
            draft_inputs=self._draft_inputs("draft_inputs", request["draft_inputs"]),
            events=self._draft_inputs("events", events) if isinstance(events, Mapping) else events,
            vocab_size=self.model.config.get_text_config(decoder=True).vocab_size,
            evidence=request["evidence"],
            choice=self.choice,
            prompt_lengths=(self._first_root + 1).tolist(),
        )

    def _inputs_for_drafters(self, pixels: Mapping[str, Any]) -> dict[str, Any]:
        shared = {k: v for k, v in self.inputs.items() if k != "mm_encoder_outputs"}
        batch = self.answers.input_ids.shape[0]
        for name, values in pixels.items():
            # num_return_sequences repeats rows; a row's clips repeat with it.
            copies = self.config.num_return_sequences or 1
            repeated = copies > 1 and values is not None and batch % copies == 0
            shared[name] = values.repeat_interleave(copies, dim=0) if repeated else values
        return {**shared, "attention_mask": self.prompt_mask}

    def _draft_inputs(self, name: str, given: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise ValueError(f"{name} must map names to tensors, got {type(given).__name__}")
        batch, copies = self.answers.input_ids.shape[0], self.config.num_return_sequences or 1

        def repeated(values: Any) -> Any:
            # What has one row for each prompt repeats with the prompts; what has all rows stays.
            if copies > 1 and isinstance(values, Tensor) and values.dim() and len(values) * copies == batch:
                return values.repeat_interleave(copies, dim=0)
            return values

        return {name: repeated(values) for name, values in given.items()}

    @property
    def root_positions(self) -> Tensor:
        """[B] absolute position of each row's last committed token."""
        return self._first_root + torch.tensor([len(answer) for answer in self.answers.answers])

    @property
    def root_ids(self) -> Tensor:
        """[B] position id of each row's last committed token, as the model counts."""
        return self._ids(self.root_positions)

    def _ids(self, positions: Tensor) -> Tensor:
        same = self._first_id is self._first_root
        return positions if same else positions + (self._first_id - self._first_root)

    def sequences(self) -> list[list[int]]:
        if self.choice.processors is None:
            return []
        return [self.answers.sequence(row) for row in range(len(self.answers.prompts))]

    def use_graphs(self, graphs: bool | str) -> None:
        """Lets steps run as CUDA graphs, see :mod:`specfuse.passes.step_graph`. Before the first step."""
        kept = graphs_of(self.target, self.choice, graphs)
        if kept is not None:
            self.graphed = kept.open(self.target, self.choice)

    def first_step(self, tree: TokenTree) -> tuple[TokenTree, Verified, Committed]:
        """The prompt's pass; returns the tree it carried and what was decided."""
        logits, tree = self.prefill(tree)
        verified = self.verify(logits, tree, self.choice, self.root_positions, self.sequences())
        return tree, verified, self.read(verified)

    def step(self, tree: TokenTree) -> tuple[TokenTree, Verified, Committed]:
        """One pass over the tree: what it carried, and what was decided, on the device and on the host."""
        positions = self.root_positions
        if self.graphed is not None:
            done = self.graphed.step(tree, self._ids(positions), positions)
            if done is not None:
                return tree, Verified(done[0], None, None), self._committed(*_columns_of(done[1]))
        if not all(self.state.active) and self._may_drop_rows():
            self.carried.drop(self.state.active, self.state.remaining, self.target, self.choice)
        logits, tree = self.score(tree, positions)
        if self.carried.all_there:
            verified = self.verify(logits, tree, self.choice, positions, self.sequences())
        else:
            verified = self.carried.verify(logits, tree, positions)
        return tree, verified, self.read(verified)

    def _may_drop_rows(self) -> bool:
        """Whether a finished row is over for good and nobody but the loop looks at the rows of a pass."""
        if not self.answers.has_eos:
            return False
        plain = self.choice.processors is None and self.verify is verify and self.graphed is None
        kept = self.config.return_dict_in_generate or self.given is not None
        return plain and not self.target.keeps_states and not kept

    def commit(self, verified: Verified, kept: list[int]) -> None:
        """Keeps what ``emit`` has emitted in the cache."""
        self.carried.commit(self.target, verified.accepted, kept)

    def score(self, tree: TokenTree, positions: Tensor) -> tuple[Tensor, TokenTree]:
        """A pass after the first: logits and the tree it carried, the roots alone where memory ran out."""
        try:
            return self.carried.forward(self.target, tree, self._ids(positions)), tree
        except (RuntimeError, MemoryError) as error:
            roots = self._without_drafts(tree, error)
        # Some layers hold new nodes, some have grown: the former are forgotten, the latter do no harm.
        self.target.cache.set_lengths(self.target.cache.lengths)
        return self.carried.forward(self.target, roots, self._ids(positions)), roots

    def _without_drafts(self, tree: TokenTree, error: BaseException) -> TokenTree:
        """What can still be tried after ``error``, and from now on; raises it again where nothing can."""
        if tree.width == 1 or not is_out_of_memory(error):
            raise error
        if self.drafter is not None:
            self.drafter.stop(f"memory ran out in a pass over {tree.width} nodes a row")
        return leave_out_finished(root_only(self.state), self.state)

    def prefill(self, tree: TokenTree) -> tuple[Tensor, TokenTree]:
        """The first pass: logits and the tree it carried, the roots alone where memory ran out."""
        alone = self.prompt_length + tree.width > MAX_MASKED_PREFILL or self.own_prompt_mask
        if tree.width > 1 and alone:
            tree = leave_out_finished(root_only(self.state), self.state)
        drafts = tree if tree.width > 1 else None
        try:
            return self.target.prefill(self.inputs, self.prompt_mask, drafts, self.past), tree
        except (RuntimeError, MemoryError) as error:
            tree = self._without_drafts(tree, error)
        self.graphed = None
        keeps_states, self.target = self.target.keeps_states, self._new_target()
        self.target.keeps_states = keeps_states
        return self.target.prefill(self.inputs, self.prompt_mask, None, self.past), tree

    def read(self, verified: Verified) -> Committed:
        """Brings the decision to the host: paths, lengths, next tokens."""
        paths, lengths, next_tokens = on_host(verified.accepted)
        return self._committed(paths, lengths, next_tokens)

    def _committed(self, paths: list[list[int]], lengths: list[int], next_tokens: list[int]) -> Committed:
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
        added, running, width = [0] * len(paths), self.state.active, self.answers.width
        for row, (path, length) in enumerate(zip(paths, lengths, strict=True)):
            if not length or not running[row]:
                continue
            emitted = [*(tokens[row][node] for node in path[1:]), next_tokens[row]]
            kept = added[row] = self.answers.append(row, emitted, width)
            stats.count(kept, drafted[row] - 1, accepted=length - 1, row=row)
            if verified.scores is not None:
                self.scores[row] += verified.scores[row][:kept]
            if verified.logits is not None:
                self.logits[row] += verified.logits[row][:kept]
        self.answers.stream()
        if self.target.states is not None:
            self._show_states(self.target.states, verified.accepted.path, added)
        self.state.active = self.answers.running
        self.state.remaining = self.answers.remaining()
        return added

    def _show_states(self, states: Tensor, path: Tensor, added: list[int]) -> None:
        """Hands drafters the states behind the tokens that were just emitted."""
        if not self.state.hidden:
            self.state.prompt_hidden = self.target.prompt_states
        nodes = path[:, : max(added)].clamp(min=0).to(torch.int64)
        self.state.hidden.append((torch.take_along_dim(states, nodes[..., None], dim=1), added))

    def result(self, stats: GenerationStats) -> GenerateDecoderOnlyOutput | Tensor:
        """What ``model.generate`` returns; the call has ended well."""
        output = self._output(stats)
        if self.graphed is not None:
            self.graphed.close()
        return output

    def _output(self, stats: GenerationStats) -> GenerateDecoderOnlyOutput | Tensor:
        if self.answers.streamer is not None:
            self.answers.streamer.end()
        sequences = self.answers.sequences()
        if self.given is None and not self.config.return_dict_in_generate:
            return sequences
        self._fill_finished_rows(sequences)
        cache = self.target.cache.to_dynamic(self.prompt_length + self.answers.width - 1, self.given)
        if not self.config.return_dict_in_generate:
            return sequences
        output = GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self._columns(self.scores, padding=True) if self.choice.keep_scores else None,
            logits=self._columns(self.logits, padding=False) if self.choice.keep_logits else None,
            **{GENERATE_CACHE: cache},
        )
        output.stats = stats
        return output

    def _fill_finished_rows(self, sequences: Tensor) -> None:
        """Computes the KV of finished rows' padding, so that the returned cache is filled in every row."""
        goal = self.prompt_length + self.answers.width - 1
        cached = [length - self.prompt_length for length in self.target.cache.lengths]
        longest = self.answers.width - 1 - min(cached, default=0)
        if longest <= 0:
            return
        answers = sequences[:, sequences.shape[1] - self.answers.width :].tolist()
        missing = [row[count:-1] for row, count in zip(answers, cached, strict=True)]
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in missing])
        positions = self.root_ids[:, None] + torch.arange(longest)
        causal = torch.ones(longest, longest, dtype=torch.bool).tril().expand(len(missing), -1, -1)
        self.target.forward(tokens, positions, causal)
        self.target.cache.set_lengths([goal] * len(missing))

    def _columns(self, rows: list[list[Tensor]], padding: bool) -> tuple[Tensor, ...]:
        """Per-row lists -> a tuple of [B, V], one per column. A finished row is certain of its padding."""
        example = next(row[0] for row in rows if row)
        filler = torch.zeros_like(example)
        if padding:
            filler = torch.full_like(example, -float("inf"))
            filler[self.answers.pad] = 0.0
        return tuple(
            torch.stack([row[column] if column < len(row) else filler for row in rows])
            for column in range(self.answers.width)
        )


def _columns_of(packed: list[list[int]]) -> Committed:
    """Paths (and what stands behind them), lengths and next tokens of rows that end in the latter two."""
    return packed, [row[-2] for row in packed], [row[-1] for row in packed]


def on_host(accepted: AcceptedPath) -> tuple[list[list[int]], list[int], list[int]]:
    """Per row the path, its length and the next token; paths may hold more behind their length."""
    if accepted.path.is_cpu:
        return accepted.path.tolist(), accepted.length.tolist(), accepted.next_token.tolist()
    # One transfer, and so one wait for the device.
    columns = [accepted.path.long(), accepted.length.long()[:, None], accepted.next_token[:, None]]
    return _columns_of(torch.cat(columns, dim=1).tolist())


def visual_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Ids that stand for pixels or sound in a prompt (``image_token_id`` and the like of the config)."""
    kinds = ("image", "video", "audio")
    names = [f"{kind}_token_{end}" for kind in kinds for end in ("id", "index")]
    found = {getattr(model.config, name, None) for name in names}
    return frozenset(token for token in found if isinstance(token, int))
