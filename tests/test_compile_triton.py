"""The gate in .ci/compile_triton.py lets good builds through and refuses the others."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)
REPOSITORY = Path(__file__).resolve().parents[1]
GATE = REPOSITORY / ".ci" / "compile_triton.py"

KERNEL = """
import triton
import triton.language as tl


@triton.jit
def sum_kernel(p_x, p_out, n, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    x = tl.load(p_x + offset, mask=offset < n, other=0.0)
    # The scan needs all of x in registers at once.
    tl.store(p_out + offset, tl.cumsum(x, 0) + tl.sum(x), mask=offset < n)
"""


@pytest.fixture(scope="module")
def gate() -> ModuleType:
    return load(GATE, "compile_triton")


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def good(gate: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> object:
    source = tmp_path_factory.mktemp("kernel") / "sum_kernel.py"
    source.write_text(KERNEL)
    return gate.CompileCase(
        name="sum",
        kernel=load(source, "sum_kernel").sum_kernel,
        signature={"p_x": "*fp32", "p_out": "*fp32", "n": "i32"},
        constexprs={"BLOCK": 1024},
        num_warps=4,
        num_stages=1,
        max_registers=64,
        max_shared=4096,
        divisible16=("p_x", "p_out", "n"),
        contains={"90": "st.global.v4"},
        archs=("90",),
    )


def test_a_good_build_passes(gate: ModuleType, good: object, capsys: pytest.CaptureFixture) -> None:
    assert gate.report([good]) == 0
    assert "1 builds of 1 Triton cases, 0 bad" in capsys.readouterr().out
    done = gate.build(good, "90")
    assert 8 < done.registers <= 64 and done.stack == 0 and 0 < done.shared <= 4096


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"max_registers": 8}, "more than 8 registers"),
        ({"max_shared": 4}, "more than 4 bytes of shared memory"),
        ({"contains": {"90": "wgmma"}}, "no wgmma in its PTX"),
        ({"divisible16": ()}, "no st.global.v4"),
        ({"signature": {"p_x": "*fp32", "p_out": "*fp32", "n": "*i8"}}, "does not compile"),
        ({"constexprs": {"BLOCK": 16384}, "num_warps": 1, "max_registers": 255}, "spills"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_bad_build_is_refused(gate: ModuleType, good: object, changes: dict, fault: str) -> None:
    bad = dataclasses.replace(good, **changes)
    assert any(fault in text for text in gate.build(bad, "90").faults)


def test_a_bad_case_and_no_case_at_all_fail_the_report(
    gate: ModuleType, good: object, tmp_path: Path
) -> None:
    assert gate.report([good, dataclasses.replace(good, max_registers=8)]) == 1
    assert gate.report([]) == 1
    assert gate.load_cases(tmp_path) == []
    (tmp_path / "triton_cases_empty.py").write_text("CASES = []\n")
    with pytest.raises(SystemExit, match="has no cases"):
        gate.load_cases(tmp_path)


def test_every_launch_asks_for_fused_multiplication_and_addition() -> None:
    """What the builds are compiled with; triton 3.10 does without unless a launch says so."""
    launches = []
    for path in sorted((REPOSITORY / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            kernel = getattr(getattr(getattr(node, "func", None), "value", None), "id", "")
            if isinstance(node, ast.Call) and kernel.endswith("_kernel"):
                launches.append((f"{path.name}:{node.lineno}", ast.unparse(node)))
    assert len(launches) >= 10
    assert [
        at for at, text in launches if "enable_fp_fusion=True" not in text and "**fused" not in text
    ] == []
