"""Compiles every csrc/*.cu for every architecture and reports registers, stack, shared memory and spills.

Usage: compile_cuda.py NVCC. Exit code 1 on a compile error, a spilled register, a limit exceeded or a kernel
without one. Needs no GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ARCHS = ("80", "86", "89", "90", "100", "120")
# Most registers per thread and static shared bytes per block, on any architecture: what the kernels'
# occupancy was reasoned with. Raising one is a decision, not a fix.
LIMITS = {
    "compact_kv_kernel": (64, 512),
    "verify_tree_scan_kernel": (64, 4608),
    "verify_tree_walk_kernel": (128, 29536),
    "verify_tree_rejection_kernel": (128, 37376),
}
ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+\w?)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def compile_one(nvcc: str, source: Path, arch: str) -> tuple[int, str]:
    flags = ["-O3", "-std=c++17", "-Xptxas", "-v", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command = [nvcc, *flags, "-c", str(source), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def rows(text: str) -> list[tuple[str, int, int, int, int]]:
    """(kernel, registers, stack bytes, spilled bytes, shared bytes) for each kernel ptxas speaks of."""
    found = []
    for part in re.split(r"(?=ptxas info\s+: Compiling entry function)", text)[1:]:
        # One line for the kernel, one for each function it calls.
        entry, spills, used = ENTRY.search(part), SPILL.findall(part), USED.search(part)
        if not (entry and spills and used):
            raise SystemExit(f"ptxas says something this script does not know:\n{part}")
        spilled = sum(int(stores) + int(loads) for _, stores, loads in spills)
        found.append((entry[1], int(used[1]), int(spills[0][0]), spilled, int(used[2] or 0)))
    return found


def demangle(names: list[str]) -> list[str]:
    try:
        done = subprocess.run(["c++filt", "-p", *names], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return names
    return [re.sub(r"\(anonymous namespace\)::", "", line) for line in done.stdout.splitlines()]


def faults(kernel: str, registers: int, spilled: int, shared: int) -> list[str]:
    """What is wrong with one build."""
    name = re.split(r"[<(]", kernel)[0].rpartition("::")[2].split()[-1]
    found = ["spills"] if spilled else []
    if name not in LIMITS:
        return [*found, f"no limit for {name} in LIMITS"]
    most_registers, most_shared = LIMITS[name]
    found += [f"more than {most_registers} registers"] if registers > most_registers else []
    return found + ([f"more than {most_shared} shared bytes"] if shared > most_shared else [])


def main() -> int:
    nvcc, sources = sys.argv[1], sorted(Path("csrc").glob("*.cu"))
    jobs = [(source, arch) for source in sources for arch in ARCHS]
    workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(lambda job: compile_one(nvcc, *job), jobs))
    bad, kernels = 0, 0
    print(f"{'arch':<7}{'registers':>9}{'stack B':>9}{'spill B':>9}{'shared B':>9}  kernel")
    for (source, arch), (code, text) in zip(jobs, results, strict=True):
        if code:
            print(f"sm_{arch}: {source} does not compile\n{text}")
            bad += 1
            continue
        table = rows(text)
        names = demangle([row[0] for row in table])
        for name, (_, registers, stack, spilled, shared) in zip(names, table, strict=True):
            wrong = faults(name, registers, spilled, shared)
            mark = "".join(f"  {fault.upper()}" for fault in wrong)
            print(f"sm_{arch:<4}{registers:>9}{stack:>9}{spilled:>9}{shared:>9}  {name}{mark}")
            bad += bool(wrong)
            kernels += 1
    print(f"{kernels} kernel builds of {len(sources)} files, {bad} bad")
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
