"""What every figure is labelled with: date, commit, hardware and versions."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

COLUMNS = ("date", "commit", "gpu", "cpu", "driver", "cuda", "torch", "triton", "transformers")


def environment() -> dict[str, str]:
    """Versions and hardware of this machine, under COLUMNS; what is not there is empty or "none"."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cpu": cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": torch.version.cuda or "",
        **{name: _version(name) for name in ("torch", "triton", "transformers")},
    }


def cpu_name() -> str:
    """The processor's model as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _output(*command: str) -> str:
    here = Path(__file__).resolve().parent
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=here).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
