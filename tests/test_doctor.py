"""specfuse doctor: what it says about a working installation, and about ones broken in known ways."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specfuse import doctor

REPOSITORY = Path(__file__).resolve().parents[1]


def run_doctor(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    search = [str(path)] if path else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*search, str(REPOSITORY)])}
    command = [sys.executable, "-m", "specfuse.cli.main", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_json_is_alone_on_stdout_and_complete() -> None:
    done = run_doctor("--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"] and report["errors"] == []
    assert {"torch", "torchvision", "triton", "transformers", "python", "specfuse"} <= set(report["versions"])
    for name in ("specfuse_tree", "sdpa", "eager"):
        assert report["attention"][name] == "ok"
    for op in ("verify_tree", "compact_kv"):
        assert report["self_test"][op] == "ok"
        assert set(report["implementations"][op]) == {"cpu", "cuda"}
    for module in report["native"].values():
        assert module["imported"] or module["reason"], "what is missing has a reason"


def test_native_modules_and_implementations_agree() -> None:
    report = doctor.diagnose()
    expected = "C++" if report["native"]["_C_cpu"]["imported"] else "eager reference"
    chosen = report["implementations"]
    assert {chosen[op]["cpu"] for op in ("verify_tree", "compact_kv")} == {expected}


def test_torchvision_of_another_build_is_explained(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    broken = 'raise RuntimeError("operator torchvision::nms does not exist")\n'
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    done = run_doctor(path=tmp_path)
    assert done.returncode == 1
    (error,) = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
    assert "does not fit torch" in error and "pip install --force-reinstall torch torchvision" in error


def test_flash_attn_4_alone_is_not_taken_for_flash_attn_2(tmp_path: Path) -> None:
    # flash-attn 4 brings the package flash_attn with only its own subpackage in it.
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    report = json.loads(run_doctor("--json", path=tmp_path).stdout)
    assert report["attention"]["flash_attention_2"].startswith("not installed")


def test_tree_attention_that_fails_is_told_in_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("Failed to find C compiler\nlong trace")

    assert doctor.attention_backends()["specfuse_tree"] == "ok"
    monkeypatch.setattr("specfuse.passes.attention.tree_attention", broken)
    assert doctor.attention_backends()["specfuse_tree"] == "RuntimeError: Failed to find C compiler"


def test_failing_op_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"verify_tree": "ok", "compact_kv": "cpu: differs from the eager reference"}
    monkeypatch.setattr("specfuse.doctor._self_test", lambda: wrong)
    report = doctor.diagnose()
    assert not report["ok"] and report["errors"] == ["compact_kv: cpu: differs from the eager reference"]


def test_ops_that_do_not_import_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str]:
        raise ImportError("no such symbol\nlong trace")

    monkeypatch.setattr("specfuse.doctor._implementations", broken)
    assert doctor.diagnose()["errors"] == ["specfuse.ops failed: ImportError: no such symbol"]


def test_notes_name_reason_and_cure() -> None:
    missing = {"built": False, "imported": False, "reason": "no C++ compiler found"}
    native = {"_C_cpu": missing, "_C_cuda": {"built": False, "imported": False, "reason": "nvcc not found"}}
    assert len(doctor.notes(native, [])) == 1, "without a GPU nothing is said about CUDA"
    cpu, cuda = doctor.notes(native, [{"name": "H200", "capability": "90"}])
    assert "no C++ compiler found" in cpu and "pip install" in cpu
    assert "nvcc not found" in cuda and "pip install" in cuda


def test_note_on_a_gpu_the_build_has_no_code_for() -> None:
    native = {"_C_cpu": {"imported": True}, "_C_cuda": {"imported": True, "archs": ["80", "90a"]}}
    assert doctor.notes(native, [{"name": "H200", "capability": "90"}]) == []
    (note,) = doctor.notes(native, [{"name": "T4", "capability": "75"}])
    assert "SPECFUSE_CUDA_ARCHS=75" in note
