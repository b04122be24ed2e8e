"""benchmarks/gpu_suite.sh where it can be tried without a GPU: its refusal, and the rows it writes."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def record_json() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record_json", BENCHMARKS / "record_json.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, the suite would run")
def test_without_a_gpu_it_says_so_and_builds_nothing() -> None:
    command = ["env", f"PYTHON={sys.executable}", str(BENCHMARKS / "gpu_suite.sh")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "gpu_suite: no CUDA device here; this suite runs on a GPU machine (see its first lines)"
    ]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
@pytest.mark.parametrize("script", ["benchmarks/gpu_suite.sh", ".ci/run"])
def test_shell_scripts_are_clean(script: str) -> None:
    done = subprocess.run(["shellcheck", script], cwd=BENCHMARKS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_figures_are_named_by_case_and_metric(record_json: ModuleType) -> None:
    run = {
        "hardware": "some GPU",
        "rounds": 7,
        "cases": [
            {"name": "B1", "dtype": "bf16", "us": {"p20": 1.5, "p50": 2}},
            {"name": "B4", "dtype": "bf16", "us": {"p20": 3, "p50": 4}, "equal": True},
        ],
        "histogram": [5, 6],
    }
    assert list(record_json.figures(run)) == [
        ("", "rounds", 7.0),
        ("B1 bf16", "cases.us.p20", 1.5),
        ("B1 bf16", "cases.us.p50", 2.0),
        ("B4 bf16", "cases.us.p20", 3.0),
        ("B4 bf16", "cases.us.p50", 4.0),
        ("B4 bf16", "cases.equal", 1.0),
        ("", "histogram.0", 5.0),
        ("", "histogram.1", 6.0),
    ]


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    source, target = tmp_path / "run.json", tmp_path / "results" / "suite.csv"
    command = [sys.executable, str(BENCHMARKS / "record_json.py"), "bench_x", str(source), str(target)]
    for value in (1, 2):
        source.write_text(json.dumps({"us": value}))
        subprocess.run(command, check=True, capture_output=True)
    rows = list(csv.DictReader(target.open()))
    assert [(row["benchmark"], row["metric"], row["value"]) for row in rows] == [
        ("bench_x", "us", "1"),
        ("bench_x", "us", "2"),
    ]
    assert rows[0]["torch"] == torch.__version__.split("+")[0] and rows[0]["date"] and rows[0]["gpu"]
    source.write_text("{}")
    assert subprocess.run(command, capture_output=True).returncode == 1
