"""Compiles every Triton kernel of .ci/triton_cases_*.py ahead of time for every architecture, without a GPU.

Usage: compile_triton.py [WORD...]: only the cases whose name holds one of the words. Prints registers, stack
and shared memory of each build. Exit code 1 on a compile error, a spilled register, a limit of the case or of
the architecture exceeded, missing PTX text, or nothing to compile. MAX_JOBS processes at a time.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
# Shared memory that one block may have, in bytes (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {"80": 166_912, "89": 101_376, "90": 232_448, "100": 232_448, "120": 101_376}
ARCHS = tuple(SHARED_LIMIT)
USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class CompileCase:
    """One kernel with the types of its arguments, its constants and what its build may use."""

    name: str
    kernel: Any  # triton.jit function
    signature: Mapping[str, str]  # {argument: "*bf16", "i32", "fp32", ...}; constexprs may be left out
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int
    max_shared: int  # bytes per block
    divisible16: tuple[str, ...] = ()  # pointers and integers that are multiples of 16, as launches find them
    contains: Mapping[str, str] = field(
        default_factory=dict
    )  # {architecture: regular expression its PTX must hold}
    archs: tuple[str, ...] = ARCHS


class Build(NamedTuple):
    """What one build uses, and what is wrong with it."""

    registers: int
    stack: int
    shared: int
    faults: list[str]


def load_cases(folder: Path) -> list[CompileCase]:
    """The ``CASES`` of every triton_cases_*.py in the folder."""
    cases: list[CompileCase] = []
    for path in sorted(folder.glob("triton_cases_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not module.CASES:
            raise SystemExit(f"{path} has no cases")
        cases += module.CASES
    return cases


def compile_case(case: CompileCase, arch: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible16}
    source = ASTSource(case.kernel, signature, dict(case.constexprs), attrs)
    # Launches say this too: left to itself, Triton 3.10 no longer fuses multiplications with additions.
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=options)


def resource_usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of stack (where spilled registers go) and static shared bytes, as cuobjdump tells."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    used = USAGE.search(done.stdout + done.stderr)
    if used is None:
        raise RuntimeError(f"cuobjdump says something this script does not know:\n{done.stdout}{done.stderr}")
    _, registers, stack, shared, local = used.groups()
    return int(registers), int(stack) + int(local), int(shared)


def build(case: CompileCase, arch: str) -> Build:
    try:
        compiled = compile_case(case, arch)
    except Exception as error:  # one kernel that does not compile is a row of the report
        return Build(0, 0, 0, [f"does not compile: {type(error).__name__}: {error}"])
    registers, stack, static = resource_usage(compiled.asm["cubin"])
    shared = max(static, int(compiled.metadata.shared))
    faults = []
    # Triton kernels have no arrays of their own: whatever lies on the stack are spilled registers.
    if stack:
        faults.append(f"spills {stack} bytes")
    if registers > case.max_registers:
        faults.append(f"more than {case.max_registers} registers")
    if shared > case.max_shared:
        faults.append(f"more than {case.max_shared} bytes of shared memory")
    if shared > SHARED_LIMIT[arch]:
        faults.append(f"sm_{arch} has {SHARED_LIMIT[arch]} bytes of shared memory per block")
    text = case.contains.get(arch)
    if text is not None and not re.search(text, compiled.asm["ptx"]):
        faults.append(f"no {text} in its PTX")
    return Build(registers, stack, shared, faults)


_cases: list[CompileCase] = []  # read by forked workers: a kernel cannot be pickled


def _build_nth(job: tuple[int, str]) -> Build:
    return build(_cases[job[0]], job[1])


def report(cases: Iterable[CompileCase]) -> int:
    """Builds all cases, prints the table; the number of bad builds, or 1 where nothing was built."""
    _cases[:] = cases
    jobs = [(i, arch) for i, case in enumerate(_cases) for arch in case.archs]
    workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        builds = list(pool.map(_build_nth, jobs))
    print(f"{'arch':<7}{'registers':>9}{'stack B':>9}{'shared B':>10}  kernel")
    for (i, arch), done in zip(jobs, builds, strict=True):
        fault = "".join(f"  {fault.upper() if len(fault) < 60 else fault}" for fault in done.faults)
        print(f"sm_{arch:<4}{done.registers:>9}{done.stack:>9}{done.shared:>10}  {_cases[i].name}{fault}")
    bad = sum(bool(done.faults) for done in builds)
    print(f"{len(jobs)} builds of {len(_cases)} Triton cases, {bad} bad")
    return bad if jobs else 1


def main() -> int:
    try:
        import triton
    except ImportError as error:
        raise SystemExit(f"needs triton: {error}") from None
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set: it replaces the compiler")
    print("triton", triton.__version__)
    sys.modules.setdefault("compile_triton", sys.modules["__main__"])  # what the case files import
    cases, words = load_cases(HERE), sys.argv[1:]
    chosen = [case for case in cases if not words or any(word in case.name for word in words)]
    return 1 if report(chosen) else 0


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    sys.exit(main())
