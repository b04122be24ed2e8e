"""The table of drafters, on a model with random weights: its figures, its files, and when it refuses."""

from __future__ import annotations

import csv
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_benchmarks import module

from specfuse import demo
from specfuse.data.world import clip
from specfuse.generate import SpeculativeGenerator
from specfuse.stats import GenerationStats
from specfuse.train.build import build_model, build_processor
from specfuse.train.presets import preset
from specfuse.train.tokenizer import train_tokenizer


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    loaded = module("bench_drafters", monkeypatch)
    monkeypatch.setattr(demo, "LONGEST", 10)
    monkeypatch.setattr(loaded, "LONGEST", 10)
    return loaded


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("micro")
    tokenizer = train_tokenizer(clip(3).questions, 300)
    build_model(preset("micro"), tokenizer, seed=1).save_pretrained(path)
    build_processor(tokenizer).save_pretrained(path)
    return path


def call(passes: int, tokens: int, drafted: int, draft_ms: float, verify_ms: float) -> GenerationStats:
    stats = GenerationStats(draft_ms=draft_ms, verify_ms=verify_ms)
    for number in range(passes):
        share = tokens // passes + (number < tokens % passes)
        stats.count(share, drafted // passes, accepted=share - 1)
    return stats


def test_columns_are_what_the_docstring_says(bench: ModuleType) -> None:
    plain = bench.Measured([1.0, 2.0, 4.0], [call(9, 9, 0, 0.0, 16.0)] * 3)  # 2 ms a pass
    drafter = bench.Measured([0.5, 0.5, 2.0], [call(3, 9, 24, 3.0, 9.0)] * 3)  # 1 ms a draft
    row = bench.figures(drafter, plain, [3.0, 3.0, 3.0])
    assert row == {
        "acceptance": 6 / 24,
        "tokens_per_pass": 3.0,
        "cost_ratio": 0.5,
        "over_plain": 2.0,
        "over_generate": 6.0,
    }
    assert bench.figures(plain, plain, [1.0, 2.0, 4.0])["over_generate"] == 1.0


def test_every_row_is_measured_and_written(
    bench: ModuleType, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--quick", "--model", str(directory), "--out", str(tmp_path)]
    table = bench.main(options)
    printed = capsys.readouterr()
    names = [name for name, _ in table]
    assert names[0] == bench.PLAIN and table[0][1]["tokens_per_pass"] == 1.0
    assert {"prompt lookup", "corpus, cold"} <= set(names)
    lines = (tmp_path / "drafters.md").read_text().splitlines()
    assert len(lines) == 2 + len(names) and all(line in printed.out for line in lines)
    written = list(csv.DictReader((tmp_path / "drafters.csv").open()))
    assert [row["drafter"] for row in written] == names
    assert {row["questions"] for row in written} == {"2"} and written[0]["torch"] == torch.__version__.split(
        "+"
    )[0]
    bench.main(options)
    assert len(list(csv.DictReader((tmp_path / "drafters.csv").open()))) == 2 * len(names)


def test_rows_without_weights_are_named(
    bench: ModuleType, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.miniature, "shipped", list)
    bench.main(["--quick", "--model", str(directory)])
    error = capsys.readouterr().err
    assert "left out, no weights: " in error and "head" in error and "corpus, warm" in error


def test_other_tokens_end_the_run(
    bench: ModuleType, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = SpeculativeGenerator.generate

    def wrong(self: SpeculativeGenerator, *arguments: object, **options: object) -> object:
        sequences = generate(self, *arguments, **options)  # type: ignore[arg-type]
        return sequences + 1 if isinstance(self.drafter, bench.PromptLookupDrafter) else sequences

    monkeypatch.setattr(SpeculativeGenerator, "generate", wrong)
    with pytest.raises(SystemExit, match="prompt lookup gave other tokens than"):
        bench.main(["--quick", "--model", str(directory)])
