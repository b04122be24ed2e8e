"""Forward passes of one Hugging Face model over token trees, on one preallocated cache.

This is the only file that knows how a Hugging Face decoder wants masks, positions and inputs. The target's
loop and ModelDrafter both run on it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, PreTrainedModel

from specfuse.hf.cache_names import cache_argument
from specfuse.hf.kv_layers import layers_with_kv
from specfuse.ops.tree_attention import MAX_NODES, beats_dense_mask
from specfuse.passes.attention import NAME as TREE_ATTENTION
from specfuse.passes.attention import TreeMask
from specfuse.passes.kv_cache import TreeCache
from specfuse.passes.mask_layout import head_dim, mask_layout
from specfuse.passes.prompt_mask import PromptTreeMask
from specfuse.passes.step_mask import StepMask
from specfuse.passes.tree_layout import ancestor_bits, node_positions
from specfuse.tree import TokenTree, pack_bits

# The prefill's dense [P + n, P + n] mask stays below 64 MB of bool; longer prompts are prefilled without a
# tree.
MAX_MASKED_PREFILL = 8192


class TreeForward:
    """A model with B ragged rows in a preallocated KV cache.

    Args:
        model: any Hugging Face decoder-only model with a language-model head, in eval mode.
        batch_size: B.
        capacity: slots to reserve per row (prompt + answer + tree).
        max_position: highest position id the model may be given; deeper tree nodes are clamped to it (they
            can not be emitted any more).

    Raises:
        ValueError: an encoder-decoder model, an attention implementation that takes no tree mask, layer
            types other than full and sliding attention, or a forward without ``position_ids``.
    """

    def __init__(
        self, model: PreTrainedModel, batch_size: int, capacity: int, max_position: int | None = None
    ):
        self.model, self.device = model, model.device
        self.config = model.config.get_text_config(decoder=True)
        self.layout = mask_layout(model, self.config)
        self.parameters = inspect.signature(model.forward).parameters
        if "position_ids" not in self.parameters:
            raise ValueError(f"model {type(model).__name__}: forward takes no position_ids, trees need them")
        self.cache_argument = cache_argument(model.forward)
        self.cache = TreeCache(layers_with_kv(self.config), batch_size, capacity)
        self.max_position = max_position
        self.takes_tree = self.layout.implementation == TREE_ATTENTION and beats_dense_mask(
            model.dtype, head_dim(self.config), self.device
        )
        self.keeps_states = False
        """Whether passes keep what the decoder hands to the language-model head, after its final norm."""
        self.states: Tensor | None = None  # [B, N, D] of the last pass's nodes
        self.prompt_states: Tensor | None = None  # [B, n, D] of the n prompt tokens computed before the root
        self.valid: Tensor | None = None  # [B, P] bool, False at left padding; None: no padding anywhere
        self.pads = [0] * batch_size
        self.starts: Tensor | None = None  # [B] int64 first valid slot, where left padding is all there is
        # [B, 1] slot minus position id: what lies between them are padding and the caller's own position ids.
        self._slot_offset = torch.zeros((batch_size, 1), dtype=torch.int64, device=self.device)
        self._tail_slots: Tensor | None = None
        self._mask: StepMask | None = None

    # ---------------------------------------------------------------- passes

    def prefill(
        self,
        inputs: Mapping[str, Any],
        prompt_mask: Tensor | None,
        tree: TokenTree | None = None,
        past: Cache | None = None,
    ) -> Tensor:
        """Runs the prompt, with a first draft tree behind it where one is given.

        Args:
            inputs: ``input_ids [B, P]`` or ``inputs_embeds [B, P, D]`` and the model's other inputs (pixels
                ...).
            prompt_mask: ``[B, P]`` with 0 at left padding, or None for no padding.
            tree: its root is the last prompt token; nodes 1 .. N-1 ride behind the prompt in the same pass.
            past: KV of the first tokens of the prompt, already computed.

        Returns:
            logits ``[B, N, V]`` of the tree's nodes (N = 1, the last prompt token, without a tree).
            Afterwards the cache is committed up to, not including, the root.
        """
        ids: Tensor = inputs["input_ids"]
        embeds: Tensor | None = inputs.get("inputs_embeds")
        length = (ids if embeds is None else embeds).shape[1]
        self._note_padding(prompt_mask)
        filled = (
            self.cache.load(past, self.layout.window) if past is not None and past.get_seq_length() else 0
        )
        if filled >= length:
            raise ValueError(
                f"past_key_values holds {filled} tokens and the prompt has {length}: the cache must "
                f"hold fewer; crop it to {length - 1} tokens, or pass the whole conversation as input_ids"
            )
        positions = self._prompt_positions(inputs, length)
        self._slot_offset = length - 1 - positions[:, -1:]
        drafted = 0 if tree is None else tree.width - 1
        call = {k: v for k, v in inputs.items() if k not in ("input_ids", "inputs_embeds", "position_ids")}
        call = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in call.items()}
        ids = ids.to(self.device)
        embeds = None if embeds is None else embeds.to(self.device)
        if tree is not None:
            nodes = tree.tokens[:, 1:].to(self.device)
            if embeds is not None:
                embeds = torch.cat([embeds, self.model.get_input_embeddings()(nodes)], dim=1)
            else:
                ids = torch.cat([ids, nodes], dim=1)
            positions = torch.cat([positions, self._node_positions(tree, positions[:, -1])[:, 1:]], dim=1)
            call["attention_mask"] = self._prefill_mask(tree, length, filled, positions)
        elif prompt_mask is not None:
            call["attention_mask"] = prompt_mask.to(self.device)
        call |= (
            {"inputs_embeds": embeds[:, filled:]} if embeds is not None else {"input_ids": ids[:, filled:]}
        )
        logits = self._call(position_ids=positions[:, filled:], keep=drafted + 1, **call)
        self.cache.set_lengths([length - 1] * logits.shape[0])
        if self.states is not None:
            before = self.states.shape[1] - drafted - 1
            self.prompt_states, self.states = self.states[:, :before], self.states[:, before:]
        return logits

    def forward(self, tokens: Tensor, positions: Tensor, tail_mask: Tensor | None) -> Tensor:
        """Runs q more nodes per row behind the committed slots and any nodes still pending.

        Args:
            tokens: ``[B, q]`` int64.
            positions: ``[B, q]`` int64 position ids.
            tail_mask: ``[B, q, t + q]`` bool: which of the t pending and q new nodes each new node sees.
                None: each row has one node, nothing is pending.

        Returns:
            logits ``[B, q, V]``.
        """
        if self.max_position is not None and positions.shape[1] > 1:
            positions = positions.clamp(max=self.max_position)
        return self._run(tokens, positions, self._step_mask(tail_mask, positions))

    def _run(self, tokens: Tensor, positions: Tensor, mask: Any) -> Tensor:
        return self.call_on_device(tokens.to(self.device), positions.to(self.device), mask)

    def call_on_device(self, tokens: Tensor, positions: Tensor, mask: Any) -> Tensor:
        """A pass over tensors on the device under a given mask; logits ``[B, q, V]``."""
        logits = self._call(input_ids=tokens, position_ids=positions, attention_mask=mask)
        if isinstance(mask, TreeMask) and not mask.read:
            raise ValueError(
                f"model {type(self.model).__name__} does not attend through transformers' "
                "AttentionInterface; load it with attn_implementation='sdpa' (or 'eager')"
            )
        return logits

    def forward_tree(self, tree: TokenTree, root_positions: Tensor) -> Tensor:
        """Runs a whole tree per row, root included; logits ``[B, N, V]``."""
        alone = tree.width == 1
        positions = (
            root_positions[:, None] if alone else node_positions(tree, root_positions, self.max_position)
        )
        if alone and self._is_plain():
            mask = None
        else:
            mask = self._kept_mask(tree)
            if mask is None:
                mask = self._step_mask(None if alone else tree.ancestor_mask(), positions)
        return self._run(tree.tokens, positions, mask)

    def commit(self, path: Tensor, length: Tensor, lengths: list[int]) -> None:
        """Keeps the first ``lengths[b]`` nodes of each accepted path of the last tree, forgets the rest."""
        slots = self.cache.lengths
        if self.cache.pending > 1 or any(count > 1 for count in lengths):
            self.cache.keep_path(path, length, slots)
        self.cache.set_lengths([slot + count for slot, count in zip(slots, lengths, strict=True)])

    def keep_rows(self, rows: list[int]) -> None:
        """Goes on with some of the rows, in ascending order; nothing may be pending."""
        self.cache.keep_rows(rows)
        self.pads = [self.pads[row] for row in rows]
        self._slot_offset = self._slot_offset[rows]
        self.valid = None if self.valid is None else self.valid[rows]
        self.starts = None if self.starts is None else self.starts[rows]
        self._mask = None

    def _call(self, keep: int | None = None, **inputs: Any) -> Tensor:
        if keep is not None and "logits_to_keep" in self.parameters:
            inputs["logits_to_keep"] = keep
        inputs |= {self.cache_argument: self.cache, "use_cache": True, "return_dict": True}
        self.cache.written = 0
        if not self.keeps_states:
            output = self.model(**inputs)
        else:
            with self._watched():
                output = self.model(**inputs)
        embeds = inputs.get("inputs_embeds")
        nodes = (inputs["input_ids"] if embeds is None else embeds).shape[1]
        if self.cache.written != nodes * len(self.cache.layers):
            self._raise_unwritten(nodes)
        return output.logits if keep is None else output.logits[:, -keep:]

    def _raise_unwritten(self, nodes: int) -> None:
        """Refuses a pass whose keys and values are not in our cache: tokens after it would be wrong."""
        raise RuntimeError(
            f"model {type(self.model).__name__} (transformers {transformers.__version__}) wrote "
            f"{self.cache.written} entries to the KV cache in a pass over {nodes} tokens, expected "
            f"{nodes} in each of {len(self.cache.layers)} layers: it ignores the cache given as "
            f"{self.cache_argument!r}, or keeps keys and values elsewhere. No token was emitted from this "
            "pass; use model.generate for this model, or a tested version of transformers"
        )

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Keeps what the decoder returns last: a cached prefix is not computed, and has no states."""
        thread = threading.get_ident()

        def keep(module: Any, arguments: Any, output: Any) -> None:
            # Hooks belong to the model, which other threads may be using.
            if threading.get_ident() == thread:
                self.states = output[0]

        # Not a hook on the head: it is given the positions whose logits are wanted, and no other.
        with self.model.get_decoder().register_forward_hook(keep):
            yield

    # ---------------------------------------------------------------- positions

    def _note_padding(self, prompt_mask: Tensor | None) -> None:
        if prompt_mask is None or bool(prompt_mask.all()):
            return
        self.valid = prompt_mask.to(self.device, torch.bool)
        pads = (~self.valid).sum(dim=1)
        self.pads = pads.tolist()
        left_padded = torch.arange(self.valid.shape[1], device=self.device) >= pads[:, None]
        self.starts = pads if torch.equal(self.valid, left_padded) else None

    def _prompt_positions(self, inputs: Mapping[str, Any], length: int) -> Tensor:
        given = inputs.get("position_ids")
        batch = len(self.pads)
        if given is not None:
            if given.dim() != 2 or given.shape[1] != length:
                raise ValueError(
                    f"model {type(self.model).__name__}: position_ids must be [B, {length}], got "
                    f"{tuple(given.shape)}; models with positions of several axes (M-RoPE) are not supported "
                    "yet, use model.generate"
                )
            return given.to(self.device).expand(batch, -1)
        positions = torch.arange(length, device=self.device)[None] - torch.tensor(
            self.pads, device=self.device
        ).reshape(-1, 1)
        return positions.clamp(min=0)

    def _node_positions(self, tree: TokenTree, roots: Tensor) -> Tensor:
        positions = tree.depths().to(self.device) + roots[:, None]
        return positions if self.max_position is None else positions.clamp(max=self.max_position)

    # ---------------------------------------------------------------- masks

    def _prefill_mask(self, tree: TokenTree, length: int, filled: int, positions: Tensor) -> Any:
        batch, total = positions.shape
        allowed = torch.ones(total, total, dtype=torch.bool, device=self.device).tril()
        mask = allowed.expand(batch, total, total).clone()
        if self.valid is not None:
            mask[:, :, :length] &= self.valid[:, None, :]
            # A padded query must see something, itself, or its softmax is NaN and so is everything after it.
            mask |= torch.eye(total, dtype=torch.bool, device=self.device)
        mask[:, length:, length:] = tree.ancestor_mask()[:, 1:, 1:].to(self.device)
        plain = self.valid is None and not filled and not self.layout.windowed
        if plain and self.layout.implementation in ("sdpa", TREE_ATTENTION):
            return PromptTreeMask.wrap(mask[:, None], length)
        # A window counts slots, as transformers does, whatever the position ids are.
        slots = torch.arange(length, device=self.device).expand(batch, -1)
        slots = torch.cat([slots, positions[:, length:] + self._slot_offset], dim=1)
        return self._finish_mask(mask[:, filled:], slots[:, filled:], slots)

    def _is_plain(self) -> bool:
        """Whether a single node per row sees all there is: no mask is needed."""
        return self.valid is None and not self.cache.ragged and not self.layout.windowed

    def _kept_mask(self, tree: TokenTree) -> Any:
        """The mask of a whole tree where it can be had without building it anew; None elsewhere."""
        if self.layout.windowed or self.cache.pending:
            return None
        if self._takes_bits(tree.width):
            return self._tree_mask(ancestor_bits(tree), tree.width)
        if self.device.type != "cpu":
            return None
        if self._mask is None:
            self._mask = StepMask(self.valid)
        lengths, longest = self.cache.lengths, self.cache.longest
        mask = self._mask.of(tree, lengths, longest + tree.width, self.cache.capacity)
        return None if mask is None else self.as_attention_mask(mask)

    def _step_mask(self, tail_mask: Tensor | None, positions: Tensor) -> Any:
        lengths, longest, pending = self.cache.lengths, self.cache.longest, self.cache.pending
        count = positions.shape[1]
        plain = self.valid is None and not self.cache.ragged
        if tail_mask is None and self._is_plain():
            return None
        tree = None
        if self._takes_bits(pending + count):
            alone = torch.ones((len(self.pads), 1, 1), dtype=torch.bool)
            tree = self._tree_mask(pack_bits(alone if tail_mask is None else tail_mask), pending + count)
        if tree is not None and not self.layout.windowed:
            return tree
        node_slots = positions.to(self.device) + self._slot_offset
        tail = self._tail(tail_mask, node_slots, pending)
        pads = torch.tensor(self.pads, device=self.device)[:, None]
        if tree is not None and int((node_slots - pads).max()) < (self.layout.window or 0):
            # Every token is within the window of every other: the layers differ in nothing yet.
            return {"full_attention": tree, "sliding_attention": tree} if self.layout.mixed else tree
        if plain:
            prefix = torch.ones((len(lengths), count, longest), dtype=torch.bool, device=self.device)
            mask = torch.cat([prefix, tail], dim=2)
        else:
            starts = torch.tensor(lengths, device=self.device)[:, None]
            seen = torch.arange(longest + pending + count, device=self.device) < starts
            if self.valid is not None:
                seen[:, : self.valid.shape[1]] &= self.valid
            slots = starts + torch.arange(pending + count, device=self.device)
            mask = seen[:, None].repeat(1, count, 1)
            mask.scatter_(2, slots[:, None].expand(-1, count, -1), tail)
        finished = self._finish_mask(mask, node_slots, self._key_slots(mask.shape[2]))
        return finished | {"full_attention": tree} if tree is not None and self.layout.mixed else finished

    def _takes_bits(self, slots: int) -> bool:
        """Bits instead of a dense mask where the model's attention takes them: 64 slots behind the prefix."""
        return self.takes_tree and slots <= MAX_NODES and (self.valid is None or self.starts is not None)

    def _tree_mask(self, bits: Tensor, slots: int) -> TreeMask:
        lengths = self.cache.device_lengths(self.device)
        return TreeMask.wrap(bits.to(self.device), lengths, self.starts, slots, self.cache.longest)

    def _tail(self, tail_mask: Tensor | None, node_slots: Tensor, pending: int) -> Tensor:
        if pending and self._tail_slots is not None:
            self._tail_slots = torch.cat([self._tail_slots[:, :pending], node_slots], dim=1)
        else:
            self._tail_slots = node_slots
        if tail_mask is None:
            return torch.ones((*node_slots.shape, 1), dtype=torch.bool, device=self.device)
        return tail_mask.to(self.device)

    def _key_slots(self, keys: int) -> Tensor | None:
        """``[B, keys]`` slot that each key has once its path is accepted; the windows count these."""
        if not self.layout.windowed:
            return None
        assert self._tail_slots is not None
        starts = torch.tensor(self.cache.lengths, device=self.device)[:, None]
        written = starts + torch.arange(self._tail_slots.shape[1], device=self.device)
        slots = torch.arange(keys, device=self.device).repeat(len(self.pads), 1)
        return slots.scatter(1, written, self._tail_slots)

    def _finish_mask(self, mask: Tensor, query_slots: Tensor, key_slots: Tensor | None) -> Any:
        """[B, q, k] bool -> what attention takes: 4-D, additive for eager, a dict where layers differ."""
        full = self.as_attention_mask(mask)
        if not self.layout.windowed:
            return full
        assert key_slots is not None and self.layout.window is not None
        distance = query_slots[:, :, None] - key_slots[:, None, :]
        windowed = self.as_attention_mask(mask & (distance < self.layout.window))
        if self.layout.mixed:
            return {"full_attention": full, "sliding_attention": windowed}
        return windowed

    def as_attention_mask(self, mask: Tensor) -> Tensor:
        """``[B, q, k]`` bool -> ``[B, 1, q, k]`` as the model's attention wants it."""
        mask = mask[:, None]
        if self.layout.implementation != "eager":
            return mask
        # Eager attention adds the mask to the scores: a bool mask would silently add 0 and 1.
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(dtype).min
        )
