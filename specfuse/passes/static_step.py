"""A step on tensors that stay where they are: what a CUDA graph can hold, and what runs without one, too.

    tokens, parents, positions, bits, lengths -> embedding, layers, head -> verify_tree -> compact_kv -> path

Everything that differs between two steps lies in one input buffer, everything the host wants to know in one
output buffer. Trees are padded to the step's number of nodes; a padded node sees the prefix and itself, no
node sees it, and what it writes behind the tree is never read.

Tested on the CPU, where the same body runs uncaptured. Not run on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specfuse.ops.compact_kv import compact_kv
from specfuse.ops.tree_attention import MAX_NODES
from specfuse.ops.verify_tree import AcceptedPath
from specfuse.passes.attention import TreeMask
from specfuse.passes.tree_forward import TreeForward
from specfuse.passes.tree_layout import ancestor_bits, node_positions
from specfuse.tree import TokenTree
from specfuse.verify import TokenChoice

_verify_tree = torch.ops.specfuse.verify_tree.default


class StepInputs:
    """What changes from step to step, side by side in one host buffer and one device buffer.

    Attributes of ``host`` and ``device`` alike: ``tokens``, ``bits``, ``positions [B, N]`` int64, ``parents
    [B, N]`` int32, ``num_nodes [B]`` int32, ``lengths`` and ``roots [B]`` int64 (committed slots; the roots'
    position in their sequence, padding not counted).
    """

    def __init__(self, batch: int, nodes: int, device: torch.device):
        words = 4 * batch * nodes + 3 * batch
        on_gpu = device.type == "cuda"
        self.buffer = torch.zeros(words, dtype=torch.int64, pin_memory=on_gpu)
        self.copy = torch.zeros(words, dtype=torch.int64, device=device) if on_gpu else self.buffer
        self.host, self.device = (_Views(words, batch, nodes) for words in (self.buffer, self.copy))

    def fill(
        self, tree: TokenTree, ids: Tensor, roots: Tensor, lengths: list[int], largest: int | None
    ) -> None:
        """Writes a step's values and sends them off.

        Args:
            tree: at most N nodes wide, on the CPU.
            ids: ``[B]`` position ids of the roots. roots: ``[B]`` their positions for the noise.
            lengths: committed slots of each row.
            largest: no position id is above it.
        """
        host, width = self.host, tree.width
        host.tokens[:, :width] = tree.tokens
        host.parents[:, :width] = tree.parents
        host.tokens[:, width:] = 0
        host.parents[:, width:] = -1
        host.num_nodes.copy_(tree.num_nodes)
        host.roots.copy_(roots)
        host.lengths.copy_(torch.tensor(lengths, dtype=torch.int64))
        padded = TokenTree(host.tokens, host.parents, host.num_nodes)
        node_positions(padded, ids, largest if width > 1 else None, out=host.positions)
        ancestor_bits(padded, out=host.bits)
        if self.copy is not self.buffer:
            self.copy.copy_(self.buffer, non_blocking=True)


class _Views:
    """The parts of one buffer of :class:`StepInputs`."""

    def __init__(self, words: Tensor, batch: int, nodes: int):
        cells = batch * nodes
        parts = words.split([cells] * 4 + [batch] * 3)
        self.tokens, self.bits, self.positions = (part.view(batch, nodes) for part in parts[:3])
        # Half of these words stays empty, for the sake of one dtype for the whole buffer.
        self.parents = parts[3].view(torch.int32)[:cells].view(batch, nodes)
        self.num_nodes = parts[4].view(torch.int32)[:batch]
        self.lengths, self.roots = parts[5], parts[6]


class RowSettings:
    """How the rows of one call choose their tokens, in tensors that every call of a batch size shares."""

    def __init__(self, batch: int, device: torch.device):
        self.rules = tuple(
            torch.zeros(batch, dtype=dtype, device=device)
            for dtype in (torch.float32, torch.int32, torch.float32, torch.float32)
        )
        self.seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        self.starts = torch.zeros(batch, dtype=torch.int64, device=device)

    def take(self, choice: TokenChoice, starts: Tensor | None) -> None:
        """Copies a call's settings; ``starts [B]`` is each row's first valid slot, None for all zero."""
        for kept, given in zip(self.rules, choice.rules, strict=True):
            kept.copy_(given)
        self.seeds.copy_(choice.seeds)
        if starts is None:
            self.starts.zero_()
        else:
            self.starts.copy_(starts)


class StaticStep:
    """One pass over trees of at most ``nodes`` nodes on a given cache.

    Args:
        batch: B. nodes: N, at most 64.
        buffers: keys and values of every layer, ``[B, G, capacity, D]``.
        settings: of the rows.

    Attributes:
        states: ``[B, N, D]`` what the decoder handed to the head, where the target keeps it.
    """

    def __init__(self, batch: int, nodes: int, buffers: list[Tensor], settings: RowSettings):
        if not 1 <= nodes <= MAX_NODES:
            raise ValueError(f"nodes must be from 1 to {MAX_NODES} (ancestor bits are one word), got {nodes}")
        device = buffers[0].device
        self.batch, self.nodes, self.buffers, self.settings = batch, nodes, buffers, settings
        self.inputs = StepInputs(batch, nodes, device)
        self.output = torch.zeros((batch, nodes + 2), dtype=torch.int64, device=device)
        self.states: Tensor | None = None
        self.accepted: AcceptedPath | None = None
        self._rows = torch.arange(batch, device=device)[:, None]
        self._columns = torch.arange(nodes, device=device)

    def body(self, target: TreeForward) -> None:
        """From input buffer to output buffer: nothing waits for the device, no shape depends on values."""
        x, settings, cache = self.inputs.device, self.settings, target.cache
        slots = x.lengths[:, None] + self._columns
        cache.static_slots = (self._rows, slots)
        try:
            logits = target.call_on_device(x.tokens, x.positions, self._mask(target, slots))
        finally:
            cache.static_slots = None
        if logits.dtype == torch.float64:
            logits = logits.float()
        trees = (x.tokens, x.parents, x.num_nodes)
        accepted = AcceptedPath(*_verify_tree(logits, *trees, *settings.rules, settings.seeds, x.roots))
        compact_kv(self.buffers, accepted.path, accepted.length, x.lengths)
        self.output[:, :-2] = accepted.path
        self.output[:, -2] = accepted.length
        self.output[:, -1] = accepted.next_token
        self.accepted, self.states = accepted, target.states

    def _mask(self, target: TreeForward, slots: Tensor) -> Tensor:
        x, capacity = self.inputs.device, self.buffers[0].shape[2]
        if target.takes_tree:
            return TreeMask.wrap(x.bits, x.lengths, self.settings.starts, self.nodes, capacity)
        slot = torch.arange(capacity, device=slots.device)
        committed = (slot >= self.settings.starts[:, None]) & (slot < x.lengths[:, None])
        mask = committed[:, None].repeat(1, self.nodes, 1)
        sees = (x.bits[:, :, None] >> self._columns & 1).bool()
        mask.scatter_(2, slots[:, None].expand(-1, self.nodes, -1), sees)
        return target.as_attention_mask(mask)
