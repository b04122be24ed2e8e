"""Builds the CUDA sources of an op for the emulator in tests/cuda_emulator: device code on the CPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]
CXX = shutil.which(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")

ORDERS = ["forward", "reverse", "1"]  # of blocks, warps and lanes; a number seeds a shuffle
FLAGS = os.environ.get("CUDA_EMULATOR_FLAGS", "").split()  # of the compiler, more of them

MODULE = """
#include "{op}_cuda_bindings.h"
PYBIND11_MODULE({name}, module) {{ specfuse::bindings::bind_{op}_cuda(module); }}
"""


DYNAMIC = re.compile(r"extern __shared__ ([\w ]+) (\w+)\[\];")


def with_dynamic_shared(text: str) -> str:
    """Source text with dynamic shared memory spelled as the emulator has it: no macro can do that."""
    return DYNAMIC.sub(r"\1* \2 = static_cast<\1*>(cuda_emulator::dynamic_shared());", text)


def copy_sources(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in (REPOSITORY / "csrc").iterdir():
        if path.suffix in {".cu", ".cuh", ".h"}:
            (folder / path.name).write_text(with_dynamic_shared(path.read_text()))


def build(name: str, sources: list[Path], folder: Path) -> ModuleType:
    """Compiles CUDA sources as C++ against the emulator's cuda_runtime.h and imports the module."""
    pybind11 = pytest.importorskip("pybind11")
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [REPOSITORY / "tests/cuda_emulator", folder / "csrc", pybind11.get_include()]
    command = [CXX, "-O1", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"]
    command += ["-Wall", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", *FLAGS]
    command += [f"-I{i}" for i in [*includes, sysconfig.get_path("include")]]
    command += ["-x", "c++", *map(str, sources), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    spec = importlib.util.spec_from_file_location(name, target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_op(op: str, folder: Path) -> ModuleType:
    """A module with one op, of csrc/<op>_cuda.cu and its bindings: no other op can break it."""
    copy_sources(folder / "csrc")
    bindings = folder / f"{op}_bindings.cpp"
    bindings.write_text(MODULE.format(op=op, name=f"{op}_emulated"))
    return build(f"{op}_emulated", [folder / "csrc" / f"{op}_cuda.cu", bindings], folder)


def poison(*outputs: Tensor) -> None:
    """Fills outputs so that what is not written shows."""
    for output in outputs:
        output.view(torch.uint8).fill_(0xA5)


def run_sanitized(*pytest_arguments: str) -> str:
    """Runs tests in a process with the address and undefined-behaviour sanitizers; returns its output.

    Tensors are allocated through the sanitizer there: reading one byte past a tensor ends the process.
    """
    runtime = [
        subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(os.path.isabs(path.strip()) for path in runtime):
        pytest.skip("the compiler has no sanitizers")
    environment = {
        **os.environ,
        "CUDA_EMULATOR_FLAGS": "-g -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        "LD_PRELOAD": " ".join(path.strip() for path in runtime),
        # Fibers leave through longjmp, and Python itself leaks.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *pytest_arguments]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    return done.stdout + done.stderr
