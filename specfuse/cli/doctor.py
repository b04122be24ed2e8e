"""``specfuse doctor``: prints what :mod:`specfuse.doctor` found."""

from __future__ import annotations

from typing import Any

import typer

from specfuse.cli import print_json, working


def doctor(json: bool = typer.Option(False, "--json", help="Print JSON, alone on stdout.")) -> int:
    """Show versions, native code, devices, attention backends; self-test every op. Exit 1 on an error."""
    with working("importing and testing", shown=not json):
        from specfuse.doctor import diagnose

        report = diagnose()
    if json:
        print_json(report)
    else:
        print("\n".join(_lines(report)))
    return 0 if report["ok"] else 1


def _lines(report: dict[str, Any]) -> list[str]:
    lines = ["versions"]
    lines += [f"  {name:<18} {version or 'not installed'}" for name, version in report["versions"].items()]
    lines += ["", "native code"]
    lines += [f"  {name:<18} {_native(entry)}" for name, entry in report["native"].items()]
    lines += ["", "devices"]
    for gpu in report["gpus"] or [None]:
        text = f"{gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gib']} GiB" if gpu else "no CUDA device"
        lines.append(f"  {text}")
    lines += ["", "ops (implementation per device)"]
    for op, devices in report["implementations"].items():
        chosen = ", ".join(f"{device}: {name}" for device, name in devices.items())
        lines.append(f"  {op:<18} {chosen}")
    lines += ["", "attention backends"]
    lines += [f"  {name:<18} {state}" for name, state in report["attention"].items()]
    lines += ["", "self-test"]
    lines += [f"  {op:<18} {result}" for op, result in report["self_test"].items()]
    lines += [""] if report["notes"] or report["errors"] else []
    lines += [f"note: {text}" for text in report["notes"]] + [f"ERROR: {text}" for text in report["errors"]]
    return lines


def _native(entry: dict[str, Any]) -> str:
    if not entry["imported"]:
        return f"not available: {entry.get('reason', 'unknown reason')}"
    archs = f", sm_{' sm_'.join(entry['archs'])}, PTX {entry['ptx']}" if "archs" in entry else ""
    return f"{entry.get('compiler', 'built by hand')}{archs}"
