"""The device code of ``compact_kv`` on the CPU, under the emulator in tests/cuda_emulator."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from emulated import FLAGS, ORDERS, build_op, needs_compiler, run_sanitized
from test_compact_kv import cache, oracle, paths, same
from torch import Tensor

from specfuse.ops.compact_kv import _native_call

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return build_op("compact_kv", tmp_path_factory.mktemp("emulated"))


@pytest.fixture(params=ORDERS, autouse=True)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_EMULATOR_ORDER", request.param)


def move(emulated: ModuleType, kv: list[Tensor], path: Tensor, length: Tensor, start: Tensor) -> None:
    call, _inputs = _native_call(kv, path, length, start)
    emulated.compact_kv(*call, 0)


@pytest.mark.parametrize("D", [1, 3, 8, 64])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes_rows_and_views(emulated: ModuleType, dtype: torch.dtype, D: int) -> None:
    """Vectors of 1 to 16 bytes: the narrowest that any tensor asks for, 65 rows over blocks of 128."""
    rows = [[0, 2, 3, 7], [0], [0, 1, 2, 6], [], list(range(0, 64, 3)), [0, 1, 3, 4, 5, 6, 7, 8, 9, 10]]
    path, length = paths(rows, 64)
    start = torch.tensor([5, 0, 2, 9, 20, 1])
    kv = [cache(6, 13, 100, D, dtype), cache(6, 1, 90, D + 1, dtype), cache(6, 2, 95, 2 * D, dtype)[:, :, 1:]]
    kv += [cache(6, 3, 95, D + 2, dtype)[..., 1:-1]] if D > 1 else []
    for tensors in (kv, kv[:1]):  # alone, the first takes its own widest vector
        tensors = [t.clone() for t in tensors]
        expected = oracle(tensors, path, length, start)
        move(emulated, tensors, path, length, start)
        assert same(tensors, expected)


@pytest.mark.parametrize("count", [1, 64, 65, 256, 257, 520])
def test_any_number_of_tensors(emulated: ModuleType, count: int) -> None:
    """Small launches take 64 tensors, large ones 256, more take several launches."""
    path, length = paths([[0, 2, 5], [0, 1, 4]], 6)
    start = torch.tensor([0, 3])
    kv = [(cache(2, 1 + t % 2, 10, 4) + t) for t in range(count)]
    expected = oracle(kv, path, length, start)
    move(emulated, kv, path, length, start)
    assert same(kv, expected)


@pytest.mark.parametrize("n", [2, 127, 128, 129, 130, 257, 400])
def test_paths_longer_than_a_stretch(emulated: ModuleType, n: int) -> None:
    """128 slots of the path are in shared memory at a time; rows end early or move little."""
    tail = list(range(n // 2, n // 2 + n - 1))
    rows = [[0, *tail], [0, *tail[: n // 3]], list(range(n)), [*range(n - 1), n + 3]]
    path, length = paths(rows, n)
    start = torch.tensor([1, 0, 7, 2])
    kv = [cache(4, 3, 2 * n + 8, 8, torch.float16), cache(4, 9, 2 * n + 8, 128, torch.uint8)]
    expected = oracle(kv, path, length, start)
    move(emulated, kv, path, length, start)
    assert same(kv, expected)


def test_many_rows_and_empty_tensors(emulated: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    B = 1000
    rows = [[0, *sorted(torch.randperm(9, generator=generator)[: b % 9].add(1).tolist())] for b in range(B)]
    path, length = paths(rows, 9)
    start = torch.randint(0, 4, (B,), generator=generator)
    kv = [cache(B, 1, 14, 2), cache(B, 0, 14, 2), cache(B, 2, 14, 0), cache(B, 1, 13, 3)[:, :, :13]]
    expected = oracle(kv, path, length, start)
    move(emulated, kv, path, length, start)
    assert same(kv, expected)


@pytest.mark.parametrize(
    ("start", "moved"), [(2, 1), (-1, 2), (-2, 1), (100, 0), (2**63 - 4, 0), (-(2**63), 0)]
)
def test_moves_that_leave_the_cache_are_left_out(emulated: ModuleType, start: int, moved: int) -> None:
    whole = cache(1, 1, 12, 4)
    kv, expected = whole[:, :, 3:9], whole.clone()
    path, length = paths([[0, 2, 5]], 6)
    move(emulated, [kv], path, length, torch.tensor([start]))
    for i, node in ((1, 2), (2, 5)):
        if start + i >= 0 and start + node < 6:
            expected[:, :, 3 + start + i] = expected[:, :, 3 + start + node].clone()
    assert torch.equal(whole, expected)
    assert int((whole != cache(1, 1, 12, 4)).any(-1).sum()) == moved


def test_only_length_says_where_a_path_ends(emulated: ModuleType) -> None:
    """Beyond the path's width or below zero it is clamped; what the path holds behind it is not read."""
    kv = cache(4, 1, 12, 4)
    path, _ = paths([[0, 2, 5], [0, 3, 6], [0, 1, 4], [0, 2, 4]], 3)
    start = torch.ones(4, dtype=torch.int64)
    expected = oracle([kv], path, torch.tensor([3, 0, 3, 2]), start)
    move(emulated, [kv], path, torch.tensor([9, -4, 3, 2], dtype=torch.int32), start)
    assert same([kv], expected)


@pytest.mark.slow
@pytest.mark.skipif(bool(FLAGS), reason="this process has the sanitizers already")
@pytest.mark.parametrize("order", ["reverse"], indirect=True)
def test_no_read_or_write_out_of_bounds() -> None:
    """Some of this file again under the address and undefined-behaviour sanitizers."""
    chosen = "reverse and (leave or (stretch and (129 or 400)) or (dtypes and 3 and float16))"
    output = run_sanitized("tests/test_compact_kv_emulated.py", "-k", chosen)
    assert "9 passed" in output, output[-3000:]
