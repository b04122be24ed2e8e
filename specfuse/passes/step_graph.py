"""Whole steps as CUDA graphs: one per batch size and number of nodes, captured once it is used often.

Graphs hold addresses. So the cache buffers of a finished call are kept for the next call of that batch size,
and graphs live as long as those buffers and the model's parameters stay where they are. What can not be
captured runs as it always did: a step is asked for, and either done here or left to the caller.

Without a GPU the same static bodies run uncaptured, which is how they are tested. Not run on a GPU yet.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specfuse.ops.verify_tree import AcceptedPath
from specfuse.passes.static_step import RowSettings, StaticStep
from specfuse.passes.tree_forward import TreeForward
from specfuse.tree import TokenTree
from specfuse.verify import TokenChoice

_log = logging.getLogger("specfuse")

BUCKETS = (1, 5, 9, 17, 33, 64)
"""Nodes of a captured step, root included: the first that holds a tree is taken."""
MAX_GRAPHS = 12  # of one model
MAX_BATCHES = 2  # batch sizes whose cache buffers are kept
WARM_UP = 2  # steps of a size that run uncaptured first: kernels are compiled and libraries set up
SLOTS = 256  # capacities are rounded up to this, so that calls of about one length share buffers
SPARE_BYTES = 2**29  # device memory that a capture leaves free

Replay = Callable[[], object]


class Arena:
    """The cache buffers and steps of one batch size; one call at a time."""

    def __init__(self, batch: int, device: torch.device):
        self.batch = batch
        self.settings = RowSettings(batch, device)
        self.buffers: list[Tensor] = []
        self.steps: dict[tuple[int, bool], StaticStep] = {}
        self.uses: Counter[tuple[int, bool]] = Counter()
        self.replays: OrderedDict[tuple[int, bool], Replay] = OrderedDict()


class StepGraphs:
    """The graphs of one model.

    Args:
        capture: takes a body and returns what replays it; None runs bodies uncaptured.
        room: bytes of device memory that are free; None where nobody counts.
    """

    def __init__(
        self,
        capture: Callable[[Replay], Replay] | None = None,
        room: Callable[[], int] | None = None,
    ):
        self.capture, self.room = capture, room
        self.free: OrderedDict[int, Arena] = OrderedDict()
        self.limit = BUCKETS[-1]  # nodes of the largest step that may still be captured
        self.placed: object = None
        self.told: set[str] = set()
        self._lock = threading.Lock()
        self.running = threading.Lock()  # graphs share memory for what lies between input and output

    def open(self, target: TreeForward, choice: TokenChoice) -> GraphedSteps:
        """Begins a call: its cache takes the buffers that the last call of this batch size left behind."""
        batch, cache = len(target.pads), target.cache
        with self._lock:
            placed = _placement(target.model)
            if placed != self.placed:  # graphs would read parameters where they no longer are
                self.free.clear()
                self.placed = placed
            arena = self.free.pop(batch, None)
        if arena is None or arena.buffers[0].shape[2] < cache.capacity:
            arena = Arena(batch, target.device)
            cache.capacity = -(-cache.capacity // SLOTS) * SLOTS
        else:
            cache.adopt(arena.buffers)
        return GraphedSteps(self, arena, target, choice)

    def close(self, arena: Arena) -> None:
        """Keeps what a call that ended well leaves behind; of a batch size the latest."""
        with self._lock:
            self.free[arena.batch] = arena
            self.free.move_to_end(arena.batch)
            while len(self.free) > MAX_BATCHES:
                self.free.popitem(last=False)

    def replay_of(self, arena: Arena, key: tuple[int, bool], body: Replay) -> Replay | None:
        """What runs a step: its graph, or its body while it warms up; None where it is not to be captured."""
        if key in arena.replays:
            arena.replays.move_to_end(key)
            return arena.replays[key]
        if self.capture is None:
            return body
        if key[0] > self.limit:
            return None
        if self.room is not None and self.room() < SPARE_BYTES:
            self._tell(f"less than {SPARE_BYTES >> 20} MiB are free: no further CUDA graphs until there are")
            return None
        arena.uses[key] += 1
        warm = arena.uses[key] > WARM_UP
        if warm:
            self._make_room(arena)
        try:
            if warm:
                arena.replays[key] = self.capture(body)
            else:
                body()
        except torch.OutOfMemoryError as error:
            # Smaller ones may still fit.
            self.limit = max((size for size in BUCKETS if size < key[0]), default=0)
            self._tell(
                f"no memory for steps of {key[0]} nodes in a CUDA graph, {self.limit} at most: {error}"
            )
            return None
        except Exception as error:
            self.limit = 0
            self._tell(f"steps of this model can not be captured in a CUDA graph and run without: {error}")
            return None
        return arena.replays[key] if warm else _done

    def _make_room(self, arena: Arena) -> None:
        kept = sum(len(other.replays) for other in self.free.values())
        while arena.replays and kept + len(arena.replays) >= MAX_GRAPHS:
            key, _ = arena.replays.popitem(last=False)
            arena.steps.pop(key)
            arena.uses.pop(key)

    def _tell(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            _log.warning(text)


class GraphedSteps:
    """The steps of one call. Not closed (an error), its buffers are not used again."""

    def __init__(self, graphs: StepGraphs, arena: Arena, target: TreeForward, choice: TokenChoice):
        self.graphs, self.arena, self.target = graphs, arena, target
        self.choice = choice
        self.bound = False

    def step(
        self, tree: TokenTree, ids: Tensor, roots: Tensor
    ) -> tuple[AcceptedPath, list[list[int]]] | None:
        """One pass over the trees, its path kept in the cache.

        Args:
            tree: the trees, on the CPU.
            ids: ``[B]`` position ids of the roots. roots: ``[B]`` their positions for the noise.

        Returns:
            What was accepted, and on the host per row the path padded with -1, its length and the next token.
            None: this step has to be done the usual way.
        """
        nodes = next((size for size in BUCKETS if size >= tree.width), None)
        cache, arena = self.target.cache, self.arena
        if nodes is None or cache.pending or cache.longest + nodes > cache.capacity or not self._bind():
            return None
        key = (nodes, self.target.keeps_states)
        step = arena.steps.get(key)
        if step is None:
            step = arena.steps[key] = StaticStep(arena.batch, nodes, arena.buffers, arena.settings)
        step.inputs.fill(tree, ids, roots, cache.lengths, self.target.max_position)
        with self.graphs.running:
            run = self.graphs.replay_of(arena, key, lambda: step.body(self.target))
            if run is None:
                return None
            run()
            rows = step.output.tolist()
        cache.path_kept = True
        self.target.states = step.states
        assert step.accepted is not None
        return step.accepted, rows

    def close(self) -> None:
        """The call has ended well: its buffers may serve the next."""
        if self._bind():
            self.graphs.close(self.arena)

    def _bind(self) -> bool:
        """Whether steps may use the cache's buffers: they exist and were not replaced by longer ones."""
        cache, arena = self.target.cache, self.arena
        if not self.bound:
            self.bound = True
            arena.settings.take(self.choice, self.target.starts)
            arena.buffers = arena.buffers or cache.buffers()
        layer: Any = cache.layers[0]
        holes = self.target.valid is not None and self.target.starts is None
        return bool(arena.buffers) and layer.keys is arena.buffers[0] and not holes


def _done() -> None:
    """Replays nothing: a step that warms up has been run."""


class GpuCapture:
    """Captures what bodies launch on one device; other threads may allocate meanwhile."""

    def __init__(self, device: torch.device):
        self.device = device
        # One pool for a model's graphs: none runs while another does.
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Replay) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
        ):
            body()
        return graph.replay

    def free_bytes(self) -> int:
        """Memory that nobody uses, what PyTorch has set aside included."""
        with torch.cuda.device(self.device):
            set_aside = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            return torch.cuda.mem_get_info()[0] + set_aside


_GRAPHS: weakref.WeakKeyDictionary[Any, StepGraphs] = weakref.WeakKeyDictionary()


def graphs_of(target: TreeForward, choice: TokenChoice, graphs: bool | str) -> StepGraphs | None:
    """The graphs kept with a model, where a call can use them.

    Args:
        target, choice: of the call.
        graphs: "auto" (on a GPU, where nothing stands in the way), True (insists; without a GPU the static
            bodies run uncaptured), or False.

    Raises:
        ValueError: ``graphs=True``, and something stands in the way.
    """
    if not graphs:
        return None
    obstacle = _obstacle(target, choice)
    if obstacle is not None and graphs is True:
        raise ValueError(f"graphs=True, but {obstacle}; use graphs='auto'")
    on_gpu = target.device.type == "cuda"
    if obstacle is not None or not (on_gpu or graphs is True):
        return None
    if target.model not in _GRAPHS:
        capture = GpuCapture(target.device) if on_gpu else None
        _GRAPHS[target.model] = StepGraphs(capture, capture.free_bytes if capture else None)
    return _GRAPHS[target.model]


def _obstacle(target: TreeForward, choice: TokenChoice) -> str | None:
    """What keeps a call's steps from being captured, in words."""
    if target.layout.windowed:
        return "layers with a sliding window take masks that depend on the positions"
    if choice.processors is not None:
        return "logits processors that are not fused run on the host"
    if choice.keep_logits or choice.keep_scores:
        return "output_scores and output_logits are collected on the host"
    return None


def _placement(model: Any) -> object:
    """Changes when what a graph would replay is no longer what the model does.

    That is: parameters moved or were replaced, attention was switched, hooks came or went, ``forward`` was
    patched.
    """
    parameters = tuple(parameter.data_ptr() for parameter in model.parameters())
    # Every hook has a number of its own.
    hooks = tuple(
        number
        for module in model.modules()
        for registered in (module._forward_hooks, module._forward_pre_hooks)
        for number in registered
    )
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    return parameters, hooks, attention, id(vars(model).get("forward")), model.training
