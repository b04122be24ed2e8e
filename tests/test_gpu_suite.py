"""benchmarks/gpu_suite.sh where it can be tried without a GPU: its refusal, and the rows it writes."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def record_json(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("record_json")


def suite(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(BENCHMARKS / "gpu_suite.sh"), *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, the suite would run")
def test_without_a_gpu_it_says_so_and_builds_nothing(tmp_path: Path) -> None:
    done = suite(tmp_path / "out")
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.splitlines() == [
        "gpu_suite: no CUDA device here; this suite runs on a GPU machine (see its first lines)"
    ]


def sections(done: subprocess.CompletedProcess[str], outcome: str) -> list[str]:
    return re.findall(rf"^--- (.+): {outcome}", done.stdout, re.MULTILINE)


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))


@pytest.mark.usefixtures("nvcc")
def test_sections_are_resumed_where_one_failed(tmp_path: Path) -> None:
    """A dry run: sections write down what they would run."""
    first = suite(tmp_path, SPECFUSE_SUITE_DRY="1", SPECFUSE_SUITE_FAIL="bench verify_tree")
    assert first.returncode == 1 and sections(first, "FAILED") == ["bench verify_tree"]
    done = sections(first, "ok")
    assert {"build", "test verify_tree", "test compact_kv", "test rest", "bench compact_kv"} <= set(done)
    second = suite(tmp_path, SPECFUSE_SUITE_DRY="1")
    assert second.returncode == 0 and sections(second, "ok") == ["bench verify_tree"]
    assert len(sections(suite(tmp_path, "--again", SPECFUSE_SUITE_DRY="1"), "ok")) == len(done) + 1


@pytest.mark.usefixtures("nvcc")
def test_sections_can_be_chosen_and_time_ends_them(tmp_path: Path) -> None:
    chosen = suite(tmp_path, "--only", "compact_kv", SPECFUSE_SUITE_DRY="1")
    names = set(sections(chosen, "ok"))
    assert {"build", "test compact_kv", "bench compact_kv"} <= names
    assert all("compact_kv" in name for name in names - {"build"})
    late = suite(tmp_path, "--budget", "0", SPECFUSE_SUITE_DRY="1")
    assert late.returncode == 1 and "verify_tree: left for the next call" in late.stdout


@pytest.mark.usefixtures("nvcc")
def test_whole_answers_replay_the_recording_that_is_given(tmp_path: Path) -> None:
    recording = tmp_path / "some.json"
    recording.write_text("{}")
    suite(tmp_path, "--only", "generate", SPECFUSE_SUITE_DRY="1", SPECFUSE_TRACE=str(recording))
    commands = {path.stem: path.read_text().split() for path in (tmp_path / "log").glob("generate_*.txt")}
    assert {"generate_miniature", "generate_7b_2091", "generate_7b_4643"} <= set(commands)
    command = commands["generate_7b_4643"]
    assert command[command.index("--trace") + 1] == str(recording)
    assert command[command.index("--prompt") + 1] == "4643"
    assert command[command.index("--device") + 1] == "cuda"


@pytest.mark.usefixtures("nvcc")
def test_every_test_file_belongs_to_one_section(tmp_path: Path) -> None:
    suite(tmp_path, SPECFUSE_SUITE_DRY="1")
    log = {path.stem: path.read_text().split() for path in (tmp_path / "log").glob("test_*.txt")}
    ignored = {word.removeprefix("--ignore=") for word in log.pop("test_rest") if "--ignore=" in word}
    files = [word for words in log.values() for word in words if word.endswith(".py")]
    assert len(files) == len(set(files)) and set(files) == ignored
    assert {"tests/test_verify_tree.py", "tests/test_compact_kv.py"} <= ignored


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
