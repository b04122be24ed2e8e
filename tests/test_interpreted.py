"""Runs the Triton kernels' tests of tests/interpreted under the interpreter, one process per file."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "interpreted"
FILES = sorted(FOLDER.glob("test_*.py"))
KERNEL_NAME = re.compile(r"^def \w+_kernel\(", re.MULTILINE)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
# The processes started here would start their own.
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="is interpreted already")


def run_interpreted(path: Path) -> str:
    """What pytest prints for the file; fails unless its tests passed and there were any."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", str(path)]
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0 or not re.search(r"\b[1-9]\d* passed", done.stdout):
        pytest.fail(f"{path.name} under the interpreter:\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout


@needs_triton
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path: Path) -> None:
    run_interpreted(path)


def test_every_triton_kernel_has_interpreted_tests() -> None:
    kernels = [path for path in (ROOT / "kernels").glob("*.py") if KERNEL_NAME.search(path.read_text())]
    tests = [path.stem for path in FILES]
    assert [k.name for k in kernels if not any(f"test_{k.stem}".startswith(name) for name in tests)] == []


KERNEL = """
import torch, triton, triton.language as tl

@triton.jit
def double_kernel(p_x, p_out, n, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    x = tl.load(p_x + offset, mask=offset < n, other=0.0)
    tl.store(p_out + offset, {factor} * x, mask=offset < n)

def test_double():
    x = torch.arange(5.0)
    out = torch.full_like(x, torch.nan)
    double_kernel[(1,)](x, out, 5, 8)
    assert torch.equal(out, 2 * x)
"""


@needs_triton
def test_a_right_kernel_passes(tmp_path: Path) -> None:
    path = tmp_path / "test_right.py"
    path.write_text(KERNEL.format(factor=2))
    assert "1 passed" in run_interpreted(path)


@needs_triton
@pytest.mark.parametrize(
    ("source", "said"),
    [
        (KERNEL.format(factor=3), "1 failed"),
        ("", "no tests ran"),
        ("import pytest\n\n@pytest.mark.skip\ndef test_nothing(): ...\n", "1 skipped"),
        ("import specfuse.no_such_module\n", "ModuleNotFoundError"),
    ],
    ids=["wrong kernel", "no tests", "all skipped", "import error"],
)
def test_what_is_wrong_in_the_child_fails_here(tmp_path: Path, source: str, said: str) -> None:
    path = tmp_path / "test_child.py"
    path.write_text(source)
    with pytest.raises(pytest.fail.Exception, match=said):
        run_interpreted(path)
