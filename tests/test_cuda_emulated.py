"""The emulator in tests/cuda_emulator notices what it should."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from emulated import FLAGS, ORDERS, build, needs_compiler, run_sanitized, with_dynamic_shared

pytestmark = needs_compiler


every_order = pytest.mark.usefixtures("order")


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_EMULATOR_ORDER", request.param)


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
__global__ void reversed_in_cluster(int* out, int* slots, bool barrier) {
  __shared__ int mine;
  if (threadIdx.x == 0) mine = blockIdx.x;
  __syncthreads();
  if (threadIdx.x < 16) slots[mine * 16 + threadIdx.x] = mine * 16 + threadIdx.x;
  if (barrier) cuda_emulator_cluster_sync();
  if (threadIdx.x < 16) out[mine * 16 + threadIdx.x] = slots[63 - (mine * 16 + threadIdx.x)];
  cuda_emulator_cluster_sync();
  if (threadIdx.x < 16) slots[mine * 16 + threadIdx.x] = -1;
}
__global__ void unwritten(int* out) {
  __shared__ int slots[64];
  extern __shared__ int dynamic[];
  out[threadIdx.x] = threadIdx.x % 2 ? slots[threadIdx.x] : dynamic[threadIdx.x];
  __syncthreads();
  slots[threadIdx.x] = dynamic[threadIdx.x] = 0;
}
__global__ void in_warps(int* out, bool) {
  const int lane = threadIdx.x % 32;
  int sum = lane;
  for (int by = 16; by > 0; by /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, by);
  const int odd = __popc(__ballot_sync(0xFFFFFFFFu, lane % 2));
  const int from = __shfl_sync(0xFFFFFFFFu, lane, 5) * 1000 + __shfl_up_sync(0xFFFFFFFFu, lane, 1);
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, 1);
  __syncthreads();
  out[threadIdx.x] = lane == 0 ? sum : lane == 1 ? odd : lane == 2 ? from : total;
}
__global__ void overrun(int* out, bool) {
  __shared__ int slots[64];
  slots[threadIdx.x] = out[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 63) out[0] = out[threadIdx.x + 1];
}
const char* launch(int kind, bool barrier, uintptr_t address, uintptr_t scratch) {
  auto out = reinterpret_cast<int*>(address), slots = reinterpret_cast<int*>(scratch);
  void* arguments[] = {&out, &barrier};
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {4, 1, 1};
  const cudaLaunchConfig_t config{dim3(4), dim3(32), 0, nullptr, &cluster, 1};
  cudaError_t status = cudaErrorInvalidValue;
  if (kind == 0) status = cudaLaunchKernel(reversed, dim3(1), dim3(64), arguments, 0, nullptr);
  if (kind == 1) status = cudaLaunchKernel(diverging, dim3(1), dim3(64), arguments, 0, nullptr);
  if (kind == 2) status = cudaLaunchKernelEx(&config, reversed_in_cluster, out, slots, barrier);
  if (kind == 3) status = cudaLaunchKernel(unwritten, dim3(2), dim3(64), arguments, 256, nullptr);
  if (kind == 4) status = cudaLaunchKernel(in_warps, dim3(1), dim3(64), arguments, 0, nullptr);
  if (kind == 5) status = cudaLaunchKernel(overrun, dim3(1), dim3(64), arguments, 0, nullptr);
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}
PYBIND11_MODULE(control, module) { module.def("launch", &launch); }
"""
REVERSED = torch.arange(63, -1, -1, dtype=torch.int32)


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("control")
    source = folder / "control.cu"
    source.write_text(with_dynamic_shared(CONTROL))
    return build("control", [source], folder)


def launch(control: ModuleType, kind: int, barrier: bool = True) -> tuple[str, torch.Tensor]:
    out, scratch = torch.full((64,), -5, dtype=torch.int32), torch.full((64,), -7, dtype=torch.int32)
    return control.launch(kind, barrier, out.data_ptr(), scratch.data_ptr()), out


@every_order
def test_a_missing_or_diverging_barrier_shows(control: ModuleType) -> None:
    error, out = launch(control, 0)
    assert error == "" and torch.equal(out, REVERSED)
    error, out = launch(control, 0, barrier=False)
    assert error == "" and not torch.equal(out, REVERSED)
    assert "diverged" in launch(control, 1)[0]


@every_order
def test_blocks_of_a_cluster_have_their_own_shared_memory_and_meet_at_its_barrier(
    control: ModuleType,
) -> None:
    error, out = launch(control, 2)
    assert error == "" and torch.equal(out, REVERSED)
    error, out = launch(control, 2, barrier=False)
    assert error == "" and not torch.equal(out, REVERSED)


@every_order
def test_shared_memory_starts_out_poisoned(control: ModuleType) -> None:
    error, out = launch(control, 3)
    assert error == "" and out.view(torch.uint8).eq(0xA5).all()


@every_order
def test_warps_exchange_and_atomics_add(control: ModuleType) -> None:
    error, out = launch(control, 4)
    assert error == "" and out[:3].tolist() == [496, 16, 5001] and out[3:32].eq(64).all()


@pytest.mark.skipif(not FLAGS, reason="runs in a process of the test below only")
def test_a_kernel_that_reads_past_a_tensor(control: ModuleType) -> None:
    launch(control, 5)


@pytest.mark.slow
def test_the_sanitizer_sees_a_read_past_a_tensor() -> None:
    output = run_sanitized("tests/test_cuda_emulated.py", "-k", "past_a_tensor or (cluster and reverse)")
    assert output.startswith(".") and "heap-buffer-overflow" in output and "overrun(int*, bool)" in output
