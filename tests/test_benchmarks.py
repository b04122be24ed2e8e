"""What the benchmarks share: rows, floors, the tuner and the plots, on a CPU with calls of known speed."""

from __future__ import annotations

import csv
import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from specfuse.kernels import tuned

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("harness", monkeypatch)


def case(harness: ModuleType, name: str = "some", **overrides: object) -> object:
    fields = {
        "providers": {"eager": lambda: time.sleep(0.004), "specfuse": lambda: time.sleep(0.001)},
        "check": lambda: None,
        "bytes": 2_000_000,
        "small": True,
    }
    return harness.Case(name, **(fields | overrides))


def test_rows_hold_times_and_the_larger_floor(harness: ModuleType) -> None:
    limits = harness.Ceilings(bytes_per_s=1e9, flops_per_s=1e9)
    rows = harness.measure(case(harness, flops=5_000_000), "cpu", 3, False, limits)
    assert [row["provider"] for row in rows] == ["eager", "specfuse"]
    assert {row["floor_us"] for row in rows} == {5000.0}, "operations bound this case"
    assert rows[0]["p50_us"] > 4000 and rows[1]["p50_us"] > 1000
    assert rows[1]["gb_per_s"] == pytest.approx(2e6 / rows[1]["p50_us"] / 1e3, rel=0.1)
    assert harness.measure(case(harness), "cpu", 3, False, limits)[0]["floor_us"] == 2000.0


def test_samples_a_second_are_told_but_are_no_column(harness: ModuleType, tmp_path: Path) -> None:
    limits = harness.Ceilings(1e9, 1e9)
    rows = harness.measure(case(harness, samples=7), "cpu", 3, False, limits)
    assert rows[0]["samples_per_s"] == round(7e6 / rows[0]["p50_us"])
    assert "samples_per_s" not in harness.measure(case(harness), "cpu", 3, False, limits)[0]
    harness.append_csv(tmp_path / "a.csv", "adapters", rows)
    with (tmp_path / "a.csv").open() as file:
        assert csv.DictReader(file).fieldnames == list(harness.ROW)


def test_a_case_that_disagrees_is_not_timed(harness: ModuleType) -> None:
    timed = []

    def wrong() -> None:
        raise AssertionError("providers differ")

    broken = case(harness, check=wrong, providers={"eager": lambda: timed.append(1)})
    with pytest.raises(AssertionError, match="providers differ"):
        harness.measure(broken, "cpu", 3, False, harness.Ceilings(1.0, 1.0))
    assert timed == []


def test_rows_are_appended_under_one_header(harness: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results" / "verify_tree.csv"
    rows = harness.measure(case(harness), "cpu", 2, False, harness.Ceilings(1e9, 1e9))
    for _ in range(2):
        harness.append_csv(path, "verify_tree", rows)
    written = list(csv.DictReader(path.open()))
    assert [row["provider"] for row in written] == ["eager", "specfuse"] * 2
    assert {row["op"] for row in written} == {"verify_tree"}
    assert written[0]["torch"].split("+")[0] == torch.__version__.split("+")[0]


# ---------------------------------------------------------------- tuner


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    (tmp_path / "some_op.json").write_text(
        json.dumps({"op": "some_op", "entries": [{"sizes": {"S": 1}, "config": {"ms": 4}}]})
    )
    monkeypatch.setattr(tuned, "CONFIGS", tmp_path)
    yield module("tune", monkeypatch)
    tuned._entries.cache_clear()
    tuned._nearest.cache_clear()


def test_the_tuner_takes_the_fastest_right_candidate(
    harness: ModuleType, tune: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def current() -> int:
        return tuned.config("some_op", {"S": 1})["ms"]

    def check() -> None:
        assert current() != 0, "the fastest is wrong"

    configs = [{"ms": 0}, {"ms": 1}, {"ms": 7}]
    tunings = lambda device: iter(  # noqa: E731
        [harness.Tuning({"S": 5}, configs, lambda: time.sleep(current() / 1e3), check)]
    )
    (entry,) = tune.tune("some_op", tunings, "cpu", seconds=60.0, rounds=3)
    assert entry["sizes"] == {"S": 5} and entry["config"] == {"ms": 1}
    assert entry["us_before"] > 4000 > entry["us"] > 1000
    assert "the fastest is wrong" in capsys.readouterr().err


def test_the_tuner_stops_in_time_and_keeps_other_sizes(
    harness: ModuleType, tune: ModuleType, tmp_path: Path
) -> None:
    one = harness.Tuning({"S": 5}, [{"ms": 1}], lambda: None, lambda: None)
    assert tune.tune("some_op", lambda device: iter([one]), "cpu", seconds=-1.0) == []
    for size in (5, 6, 5):
        entries = [{"sizes": {"S": size}, "config": {"ms": size}}]
        path = tune.write("some_op", "nvidia-x", entries, tmp_path)
    table = json.loads(path.read_text())
    assert path.name == "some_op.nvidia-x.json" and table["measured"] and table["gpu"] == "nvidia-x"
    assert [entry["sizes"]["S"] for entry in table["entries"]] == [5, 6]


# ---------------------------------------------------------------- plots

HEADER = "date,commit,gpu,cpu,torch,op,case,provider,p50_us,share\n"
ROWS = (
    "2026-01-01 10:00,abc,some GPU,x,2.11,verify_tree,B1,eager,40,0.1\n"
    "2026-01-01 10:00,abc,some GPU,x,2.11,verify_tree,B1,specfuse,5,0.8\n"
    "2026-01-02 10:00,def,some GPU,x,2.11,verify_tree,B1,specfuse,4,0.9\n"
    "2026-01-03 10:00,ghi,none,a CPU,2.15,verify_tree,B1,eager,90,\n"
    "2026-01-03 10:00,ghi,none,a CPU,2.15,verify_tree,B1,specfuse,30,\n"
)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "verify_tree.csv"
    path.write_text(HEADER + ROWS)
    return path


def test_plots_show_the_newest_row_of_each_device(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot = module("plot", monkeypatch)
    shares, label = plot.read([results], "gpu", "share")
    assert shares == {"verify_tree": {"B1": {"eager": 0.1, "specfuse": 0.9}}}
    assert label == "some GPU, torch 2.11, commit def, 2026-01-02"
    speedups, label = plot.read([results], "cpu", "speedup")
    assert speedups == {"verify_tree": {"B1": {"specfuse": 3.0}}} and label.startswith("a CPU")
    with pytest.raises(ValueError, match="no share measured on a cpu"):
        plot.read([results], "cpu", "share")


def test_plots_are_written_as_png_and_svg(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    plot = module("plot", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(results), "--out", str(tmp_path / "plots")])
    plot.main()
    assert (tmp_path / "plots" / "share_gpu.png").read_bytes().startswith(b"\x89PNG")
    assert "some GPU" in (tmp_path / "plots" / "share_gpu.svg").read_text()


def test_plots_refuse_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "end_to_end.csv"
    other.write_text("date,benchmark,value\n2026-01-01,x,1\n")
    with pytest.raises(ValueError, match=r"end_to_end\.csv is not the CSV of a micro-benchmark"):
        module("plot", monkeypatch).read([other], "gpu", "share")
