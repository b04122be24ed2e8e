"""The device code of ``compact_kv`` on the CPU, under the emulator in tests/cuda_emulator."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from emulated import ORDERS, build_op, needs_compiler
from test_compact_kv import cache, oracle, paths

from specfuse.ops.compact_kv import _native_call

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return build_op("compact_kv", tmp_path_factory.mktemp("emulated"))


@pytest.fixture(params=ORDERS, autouse=True)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_EMULATOR_ORDER", request.param)


@pytest.mark.parametrize("D", [1, 3, 8, 64])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64], ids=str)
def test_compact_kv(emulated: ModuleType, dtype: torch.dtype, D: int) -> None:
    rows = [[0, 2, 3, 7], [0], [0, 1, 2, 6], [], list(range(0, 64, 3))]
    path, length = paths(rows, 64)
    start = torch.tensor([5, 0, 2, 9, 20])
    kv = [cache(5, 4, 100, D, dtype), cache(5, 1, 90, D + 1, dtype), cache(5, 2, 95, 8)[:, :, 1:]]
    kv += [cache(5, 1, 90, 4)] * 260  # more tensors than one launch takes
    kv = [t.clone() for t in kv]
    expected = oracle(kv, path, length, start)
    call, _inputs = _native_call(kv, path, length, start)
    emulated.compact_kv(*call, 0)
    assert all(torch.equal(a, e) for a, e in zip(kv, expected, strict=True))


def test_compact_kv_leaves_out_moves_that_leave_the_cache(emulated: ModuleType) -> None:
    whole = cache(1, 1, 12, 4)
    kv, before = whole[:, :, 3:9], whole.clone()
    path, length = paths([[0, 2, 5]], 6)
    call, _inputs = _native_call([kv], path, length, torch.tensor([2]))
    emulated.compact_kv(*call, 0)
    before[:, :, 6] = before[:, :, 7]
    assert torch.equal(whole, before)
