"""Inputs and comparisons for the tests of ``tree_attention``: every slot that no node sees holds NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specfuse.kernels.tree_attention_ref import tree_attention_ref


@dataclass
class TreeCase:
    """Sizes of one call; ``str`` is its test id."""

    N: int
    lengths: list[int]
    starts: list[int] | None = None
    H: int = 4
    G: int = 2
    D: int = 64
    own: bool = False  # the tree's keys in tensors of their own rather than behind the prefix
    tail: int | None = None  # more tail slots than nodes: a tree grown level by level
    padding: int = 0  # this many last nodes see nothing

    def __str__(self) -> str:
        spans = "_".join(map(str, self.lengths)) + (f"-from{self.starts}" if self.starts else "")
        own = f"{'-own' if self.own else ''}{f'-tail{self.tail}' if self.tail else ''}"
        return f"N{self.N}-S{spans}-H{self.H}-G{self.G}-D{self.D}{own}"


# Nodes and prefixes around the tile sizes of kernels/configs, group sizes, head dims, ragged and padded rows.
CASES = [
    TreeCase(1, [1]),
    TreeCase(1, [64], G=4),
    TreeCase(2, [0]),
    TreeCase(5, [0, 7, 1], starts=[0, 7, 0], padding=2),
    TreeCase(15, [63, 31], H=7, G=1, D=80),
    TreeCase(16, [64, 65], starts=[0, 33], D=128),
    TreeCase(17, [127], D=96, H=2, G=2),
    TreeCase(33, [31, 149], starts=[30, 5], D=80, own=True),
    TreeCase(64, [97, 3], H=3, G=3, padding=3),
    TreeCase(64, [33], D=128, own=True),
    TreeCase(3, [40, 12], tail=11),
    TreeCase(4, [5, 66], tail=64, own=True),
    TreeCase(7, [101, 101], starts=[0, 0]),
    TreeCase(9, [64, 64], starts=[3, 3], own=True),
]


def random_parents(N: int, generator: torch.Generator) -> list[int]:
    return [-1] + [int(torch.randint(i, (1,), generator=generator)) for i in range(1, N)]


def ancestor_bits(parents: list[int], padding: int = 0) -> list[int]:
    """Signed 64-bit words: bit j of entry i says that node i sees node j."""
    words: list[int] = []
    for i, parent in enumerate(parents):
        words.append((words[parent] if parent >= 0 else 0) | 1 << i)
    words[len(words) - padding :] = [0] * padding
    return [word - 2**64 if word >= 2**63 else word for word in words]


def tree_case(case: TreeCase, dtype: torch.dtype = torch.float32, slack: int = 3, seed: int = 0) -> dict:
    """Arguments of ``tree_attention`` by name, NaN wherever the definition does not look."""
    generator = torch.Generator().manual_seed(seed)
    B, tail = len(case.lengths), case.tail or case.N

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = [ancestor_bits(random_parents(tail, generator), case.padding)[-case.N :] for _ in range(B)]
    slots = max(case.lengths) + slack + (0 if case.own else tail)
    x = {
        "q": draw(B, case.H, case.N, case.D),
        "k_cache": draw(B, case.G, slots, case.D),
        "v_cache": draw(B, case.G, slots, case.D),
        "lengths": torch.tensor(case.lengths),
        "ancestors": torch.tensor(rows),
        "k_tree": draw(B, case.G, tail, case.D) if case.own else None,
        "v_tree": draw(B, case.G, tail, case.D) if case.own else None,
        "starts": None if case.starts is None else torch.tensor(case.starts),
        "tail": tail,
    }
    for b in range(B):
        seen = torch.zeros(slots, dtype=torch.bool)
        seen[0 if case.starts is None else case.starts[b] : case.lengths[b]] = True
        nodes = torch.tensor([any(word >> j & 1 for word in rows[b]) for j in range(tail)])
        if not case.own:
            seen[case.lengths[b] : case.lengths[b] + tail] = nodes
        for name in ("k_cache", "v_cache"):
            x[name][b, :, ~seen] = torch.nan
        for name in ("k_tree", "v_tree"):
            if x[name] is not None:
                x[name][b, :, ~nodes] = torch.nan
    return x


def definition(x: dict) -> Tensor:
    """The reference in float64."""
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in x.items()}
    return tree_attention_ref(**wide)


def assert_close(actual: Tensor, x: dict, slack: float = 2.0) -> None:
    """``actual`` may be off by ``slack`` times what the definition is off in the dtype of the inputs."""
    truth = definition(x)
    assert actual.shape == truth.shape and actual.dtype == x["q"].dtype
    allowed = slack * float((tree_attention_ref(**x).double() - truth).abs().max()) + _STEP[actual.dtype]
    error = (actual.double() - truth).abs().nan_to_num(nan=torch.inf)
    if error.numel() and float(error.max()) > allowed:
        worst = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
        raise AssertionError(
            f"[b, h, n, d] = {worst}: {float(actual[*worst])} instead of {float(truth[*worst])}, "
            f"off by {float(error.max()):.3g}, allowed {allowed:.3g}"
        )


# One step of rounding at the size of the outputs (about 1); sums are taken in another order.
_STEP = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
