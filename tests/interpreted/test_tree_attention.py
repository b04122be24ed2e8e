"""The Triton kernels of ``tree_attention`` under the interpreter, one to several splits, small tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from tree_attention_cases import CASES, TreeCase, assert_close, definition, tree_case

from specfuse.kernels import tree_attention as kernel
from specfuse.kernels import tuned


def config(splits: int, **changes: int) -> dict[str, int]:
    base = {"BLOCK_M": 16, "BLOCK_S": 32, "blocks_per_sm": 2, "num_warps": 4, "num_stages": 2}
    return base | {"splits": splits} | changes


def launch(x: dict, out: Tensor | None = None) -> Tensor:
    B, H, N, D = x["q"].shape
    # Poisoned: an element that no program writes is seen.
    out = torch.full((B, N, H, D), torch.nan, dtype=x["q"].dtype).transpose(1, 2) if out is None else out
    longest = x["k_cache"].shape[2]
    return kernel.tree_attention(**x, scale=D**-0.5, longest=longest, out=out)


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial results that a split does not write are NaN."""
    empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: object, **options: object) -> Tensor:
        made = empty(self, *args, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.mark.parametrize(
    ("case", "splits"), [*((c, 3) for c in CASES), *((c, 1) for c in CASES if c.N < 20)], ids=str
)
def test_float32(case: TreeCase, splits: int) -> None:
    x = tree_case(case)
    with tuned.override("tree_attention", config(splits)):
        assert_close(launch(x), x)


@pytest.mark.parametrize("case", CASES[4:8], ids=str)
def test_float16(case: TreeCase) -> None:
    x = tree_case(case, torch.float16)
    with tuned.override("tree_attention", config(2, BLOCK_M=32, BLOCK_S=16)):
        assert_close(launch(x), x)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 32, 48, 49, 97])
def test_lengths_around_the_shares_of_a_split(length: int) -> None:
    x = tree_case(TreeCase(4, [length, 50], starts=[length // 3, 0], padding=1))
    for splits in (1, 2, 7):
        with tuned.override("tree_attention", config(splits, BLOCK_S=16)):
            assert_close(launch(x), x)


@pytest.mark.parametrize("own", [True, False])
def test_views_of_larger_tensors(own: bool) -> None:
    """Keys and values with strides of their own, an output inside a larger tensor."""
    x = tree_case(TreeCase(35 if own else 5, [40, 21], H=2, G=1, D=80, own=own))
    for extra, name in enumerate(("k_cache", "v_cache", "k_tree", "v_tree")[: 4 if own else 2]):
        B, G, S, D = x[name].shape
        larger = torch.full((B + 1, S + 2 + extra, G + 1 + extra, D + 16), torch.nan)
        view = larger[1:, 1 : S + 1, :G, 8 : 8 + D].transpose(1, 2)
        x[name] = view.copy_(x[name])
    N = x["q"].shape[2]
    larger = torch.full((2, 2, N + 4, 80), torch.nan)
    with tuned.override("tree_attention", config(2, BLOCK_S=16)):
        out = launch(x, larger[:, :, 2 : N + 2])
    assert_close(out, x)
    assert larger[:, :, :2].isnan().all() and larger[:, :, N + 2 :].isnan().all()


def test_the_chosen_configurations_agree() -> None:
    """Whatever kernels/configs holds, the answer is the same."""
    x = tree_case(TreeCase(17, [333, 150], H=8, D=64))
    configs = {str(e["config"]): e["config"] for e in tuned._entries("tree_attention", None)}
    assert len(configs) > 3
    for chosen in configs.values():
        with tuned.override("tree_attention", chosen):
            assert_close(launch(x), x)
    assert_close(launch(x), x)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("N", [3, 32, 33])
def test_bits_beyond_the_tail_mean_nothing(N: int, own: bool) -> None:
    x = tree_case(TreeCase(N, [20], own=own), slack=7)
    expected = definition(x)
    x["ancestors"] = x["ancestors"] | -1 << N
    for name in ("k_tree", "v_tree"):
        if own:  # a row behind the last one, for whoever reads it
            x[name] = torch.cat([x[name], torch.full((1, 2, 1, 64), torch.nan)], dim=2)[:, :, :N]
    with tuned.override("tree_attention", config(2)):
        torch.testing.assert_close(launch(x).double(), expected, atol=1e-6, rtol=0)


def test_slots_beyond_the_cache_are_not_read() -> None:
    x = tree_case(TreeCase(3, [20]), slack=0)
    larger = {name: torch.full((1, 2, 40, 64), torch.nan) for name in ("k_cache", "v_cache")}
    for name, tensor in larger.items():
        x[name] = tensor[:, :, :23].copy_(x[name])
    x["lengths"] = torch.tensor([22])  # tail slots 23 and 24 do not exist
    with tuned.override("tree_attention", config(2)):
        assert torch.isfinite(launch(x)).all()
        x["lengths"] = torch.tensor([39])
        assert torch.isfinite(launch(x)).all()


def test_pipeline_stages_fit_the_shared_memory_of_the_device() -> None:
    """The bytes that the compiler takes for these tiles (.ci/compile_triton.py prints them), by device."""
    shared = {80: 166_912, 89: 101_376, 90: 232_448, 120: 101_376}
    for capability, (block_m, block_s), stages, expected in (
        (89, (64, 64), 4, 3),  # 90,112 bytes with 3
        (120, (128, 64), 3, 2),  # 65,536 with 2
        (90, (64, 64), 4, 4),  # 147,456 with 4
        (80, (128, 64), 5, 4),
        (90, (128, 128), 9, 2),
    ):
        device = kernel._Device(capability, 100, shared[capability])
        assert kernel._stages(stages, device, block_m, block_s, 128, 2) == expected
    assert kernel._stages(3, kernel._Device(75, 40, 65_536), 128, 128, 128, 2) == 1
