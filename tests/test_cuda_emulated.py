"""The emulator in tests/cuda_emulator notices what it should."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from emulated import ORDERS, build, needs_compiler

pytestmark = needs_compiler


@pytest.fixture(params=ORDERS, autouse=True)
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
