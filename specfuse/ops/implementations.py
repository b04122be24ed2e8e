"""Which implementation each op uses on each device, and a short test that it gives the reference's answer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from specfuse.ops.self_tests import SELF_TESTS

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def implementations() -> dict[str, dict[str, str]]:
    """``{op: {device: name}}``: "C++", "CUDA", "Triton" or "eager reference", as will be dispatched."""
    return {
        op: {
            device: getattr(test, device) or "eager reference" if _registered(op, key) else "eager reference"
            for device, key in _DISPATCH_KEYS.items()
        }
        for op, test in SELF_TESTS.items()
    }


def self_test() -> dict[str, str]:
    """``{op: "ok" or what went wrong}``: every op against its reference, on each device there is."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {op: "; ".join(_failures(test.run, devices)) or "ok" for op, test in SELF_TESTS.items()}


def _registered(op: str, dispatch_key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"specfuse::{op}", dispatch_key)


def _failures(run: Callable[[str], bool], devices: list[str]) -> list[str]:
    failures = []
    for device in devices:
        try:
            if not run(device):
                failures.append(f"{device}: differs from the eager reference")
        except Exception as error:  # doctor reports whatever breaks rather than breaking itself
            failures.append(f"{device}: {type(error).__name__}: {error}")
    return failures
