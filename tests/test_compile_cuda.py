"""The gate in .ci/compile_cuda.py: what ptxas reports becomes rows, and what exceeds a limit is named."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PTXAS = """\
ptxas info    : Compiling entry function '_Z1av' for 'sm_90'
ptxas info    : Function properties for _Z1av
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""


@pytest.fixture(scope="module")
def gate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_cuda", ROOT / ".ci" / "compile_cuda.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_ptxas_says_is_read(gate: ModuleType) -> None:
    assert gate.rows(PTXAS) == [("_Z1av", 40, 16, 12, 512), ("_Z1bv", 32, 0, 0, 0)]


def test_faults_are_named(gate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "LIMITS", {"some_kernel": (64, 512)})
    name = "void specfuse::some_kernel<(specfuse::LogitsDtype)2, 256>"
    assert gate.faults(name, 64, 0, 512) == []
    assert gate.faults(name, 65, 0, 512) == ["more than 64 registers"]
    assert gate.faults(name, 1, 4, 513) == ["spills", "more than 512 shared bytes"]
    assert gate.faults("specfuse::other_kernel", 1, 0, 0) == ["no limit for other_kernel in LIMITS"]


def test_every_kernel_has_a_limit_and_every_limit_a_kernel(gate: ModuleType) -> None:
    sources = "".join(p.read_text() for p in (ROOT / "csrc").iterdir() if p.suffix in {".cu", ".cuh"})
    for kernel in gate.LIMITS:
        assert f" {kernel}(" in sources, f"{kernel} is gone"
