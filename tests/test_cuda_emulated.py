"""The CUDA kernels' device code on the CPU, under the emulator in tests/cuda_emulator."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_compact_kv import cache, oracle, paths
from torch import Tensor
from verify_tree_cases import FILTERED, SAMPLED, arguments, assert_same, random_tree

from specfuse.kernels.verify_tree_ref import verify_tree_ref
from specfuse.ops.compact_kv import _native_call as compact_call
from specfuse.ops.verify_tree import _native_call as verify_call

REPOSITORY = Path(__file__).resolve().parents[1]
CXX = shutil.which(os.environ.get("CXX", "g++"))
SOURCES = ["verify_tree_cuda.cu", "compact_kv_cuda.cu", "bindings_cuda.cpp"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RULES = {"greedy": {"temperature": 0.0}, "sampled": SAMPLED, "filtered": FILTERED}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")


def build(name: str, sources: list[Path], folder: Path) -> ModuleType:
    """Compiles CUDA sources as C++ against the emulator's cuda_runtime.h and imports the module."""
    pybind11 = pytest.importorskip("pybind11")
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [REPOSITORY / "tests/cuda_emulator", REPOSITORY / "csrc", pybind11.get_include()]
    command = [CXX, "-O1", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"]
    command += [
        "-Wall",
        "-Wno-unknown-pragmas",
        *(f"-I{i}" for i in [*includes, sysconfig.get_path("include")]),
    ]
    command += ["-x", "c++", *map(str, sources), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    spec = importlib.util.spec_from_file_location(name, target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    sources = [REPOSITORY / "csrc" / source for source in SOURCES]
    return build("_C_cuda", sources, tmp_path_factory.mktemp("emulated"))


def verify(emulated: ModuleType, *args: Tensor) -> tuple[Tensor, ...]:
    call, outputs, _inputs = verify_call(args[0], args[1:])
    for output in outputs:
        output.view(torch.uint8).fill_(0xA5)  # what is not written shows
    emulated.verify_tree(*call, 0)
    return outputs


@pytest.fixture(params=["1", "2"], ids=["order1", "order2"], autouse=True)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two orders in which the threads of a block run."""
    monkeypatch.setenv("CUDA_EMULATOR_ORDER", request.param)


@dtypes
@pytest.mark.parametrize("V", [1, 130, 2100])
@rules
def test_verify_tree(emulated: ModuleType, dtype: torch.dtype, V: int, rule: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(V)
    tokens, parents = random_tree(generator, 4, 9, V)
    logits = (torch.randn(4, 9, V, generator=generator) * 3).to(dtype)
    num_nodes = torch.tensor([9, 0, 1, 6], dtype=torch.int32)
    args = arguments(logits, tokens, parents, num_nodes, positions=2**33 + 5, **rule)
    assert_same(verify(emulated, *args), verify_tree_ref(*args))


def test_verify_tree_rows_of_one_batch_follow_their_own_rules(emulated: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    B, N, V = 40, 3, 23
    tokens, parents = random_tree(generator, B, N, V)
    logits = (torch.randn(B, N, V, generator=generator) * 2).round()  # with ties
    logits[torch.rand(logits.shape, generator=generator) < 0.2] = -math.inf
    pick = lambda values: torch.tensor(values)[torch.randint(0, len(values), (B,), generator=generator)]  # noqa: E731
    args = arguments(
        logits, tokens, parents, temperature=pick([0.0, 0.5, 1.0, 2.0]), top_k=pick([0, 1, 3, 40]),
        top_p=pick([1.0, 0.9, 0.5, 0.05]), min_p=pick([0.0, 0.1, 1.0]), seed=torch.arange(B) - 7,
    )  # fmt: skip
    assert_same(verify(emulated, *args), verify_tree_ref(*args))


@rules
@pytest.mark.parametrize("broken", [math.nan, -math.inf, math.inf])
def test_verify_tree_without_a_distribution(
    emulated: ModuleType, rule: dict[str, float], broken: float
) -> None:
    logits = torch.full((1, 2, 70), -math.inf)
    logits[0, 0, 1] = 0.0
    logits[0, 1] = broken if broken < 0 else 0.0
    logits[0, 1, 69] = broken
    args = arguments(logits, torch.tensor([[0, 1]]), torch.tensor([[-1, 0]], dtype=torch.int32), **rule)
    assert_same(verify(emulated, *args), verify_tree_ref(*args))


def test_verify_tree_views_and_wide_trees(emulated: ModuleType) -> None:
    N = 700  # more nodes than threads in a block
    base = torch.randn(2, N, 9, 2)
    tokens = torch.randint(0, 9, (2, N))
    parents = torch.zeros(2, N, dtype=torch.int32)
    parents[:, 0] = -1
    args = arguments(base[..., 1], tokens, parents, temperature=1.0)
    assert_same(verify(emulated, *args), verify_tree_ref(*args))


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
    call, _inputs = compact_call(kv, path, length, start)
    emulated.compact_kv(*call, 0)
    assert all(torch.equal(a, e) for a, e in zip(kv, expected, strict=True))


def test_compact_kv_leaves_out_moves_that_leave_the_cache(emulated: ModuleType) -> None:
    whole = cache(1, 1, 12, 4)
    kv, before = whole[:, :, 3:9], whole.clone()
    path, length = paths([[0, 2, 5]], 6)
    call, _inputs = compact_call([kv], path, length, torch.tensor([2]))
    emulated.compact_kv(*call, 0)
    before[:, :, 6] = before[:, :, 7]
    assert torch.equal(whole, before)


# ---------------------------------------------------------------- the emulator notices what it should

CONTROL = """
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
__global__ void reversed(int* out, bool barrier) {
  __shared__ int slots[64];
  slots[threadIdx.x] = threadIdx.x;
  if (barrier) __syncthreads();
  out[threadIdx.x] = slots[63 - threadIdx.x];
  __syncthreads();
  slots[threadIdx.x] = -1;
}
__global__ void diverging(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 0;
}
const char* launch(bool diverge, bool barrier, uintptr_t address) {
  auto out = reinterpret_cast<int*>(address);
  void* arguments[] = {&out, &barrier};
  auto status = diverge ? cudaLaunchKernel(diverging, dim3(1), dim3(64), arguments, 0, nullptr)
                        : cudaLaunchKernel(reversed, dim3(1), dim3(64), arguments, 0, nullptr);
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}
PYBIND11_MODULE(control, module) { module.def("launch", &launch); }
"""


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("control")
    (folder / "control.cu").write_text(CONTROL)
    return build("control", [folder / "control.cu"], folder)


def test_the_emulator_shows_missing_and_diverging_barriers(control: ModuleType) -> None:
    out, right = torch.zeros(64, dtype=torch.int32), torch.arange(63, -1, -1, dtype=torch.int32)
    assert control.launch(False, True, out.data_ptr()) == "" and torch.equal(out, right)
    assert control.launch(False, False, out.data_ptr()) == "" and not torch.equal(out, right)
    assert "diverged" in control.launch(True, True, out.data_ptr())
