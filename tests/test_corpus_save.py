"""Saving and loading a CorpusDrafter: identical proposals, and files that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_cases import accepted, filled, ids, row

from specfuse.drafters import CorpusDrafter
from specfuse.drafters.corpus_fallback import PythonCorpusIndex
from specfuse.ops import native


def proposals(drafter: CorpusDrafter) -> list[Any]:
    trees = [drafter.propose(row([1, 2, 3][:n], [n % 3]), 24) for n in range(4)]
    return [(t.tokens.tolist(), t.parents.tolist(), t.probs.tolist()) for t in trees]


def test_save_and_load_give_identical_proposals(tmp_path: Path):
    drafter = filled()
    drafter.save(tmp_path / "corpus.safetensors")
    loaded = CorpusDrafter().load(tmp_path / "corpus.safetensors")
    assert proposals(loaded) == proposals(drafter)
    assert (len(loaded), loaded.num_tokens) == (len(drafter), drafter.num_tokens)
    for both in (drafter, loaded):
        both.observe([1, 2, 3, 4, 5], question=[0])
    assert proposals(loaded) == proposals(drafter), "and they stay identical while learning on"


def test_saving_replaces_a_file_and_leaves_no_other_behind(tmp_path: Path):
    drafter = CorpusDrafter()
    for _ in range(2):
        drafter.observe([5, 6, 7], question=[1])
        drafter.save(tmp_path / "corpus.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.safetensors"]
    assert len(CorpusDrafter().load(tmp_path / "corpus.safetensors")) == 2
    with pytest.raises(OSError):
        drafter.save(tmp_path / "missing" / "corpus.safetensors")


def test_loading_into_a_smaller_drafter_keeps_the_newest(tmp_path: Path):
    drafter = filled()
    drafter.observe([70, 71, 72, 73], question=[0])
    drafter.save(tmp_path / "corpus.safetensors")
    small = CorpusDrafter(max_tokens=100).load(tmp_path / "corpus.safetensors")
    assert 0 < small.num_tokens <= 100
    assert 71 in small.propose(row([70], [0]), 8).tokens[0].tolist()


def test_loading_replaces_the_content_and_clear_forgets_it(tmp_path: Path):
    filled().save(tmp_path / "corpus.safetensors")
    drafter = CorpusDrafter()
    drafter.observe([90, 91, 92], question=[0])
    drafter.load(tmp_path / "corpus.safetensors")
    assert 91 not in drafter.propose(row([90], [0]), 32).tokens[0].tolist()
    drafter.clear()
    assert (len(drafter), drafter.num_tokens) == (0, 0)
    assert drafter.propose(row([1, 2], [0]), 8).num_nodes.tolist() == [1]


def test_the_native_index_reads_what_the_python_one_saved():
    if native.cpu is None:
        pytest.skip(f"native module not built: {native.missing.get('cpu')}")
    python = PythonCorpusIndex(1000)
    for _ in range(3):
        python.observe(ids(1, 2, 3, 4), scope=5, evidence=6)
    index = native.cpu.CorpusIndex(1000)
    index.import_content(*python.export_content())
    assert (index.num_answers, index.num_tokens) == (3, 12)
    assert accepted(index.propose(ids(1), scope=5), [2, 3, 4]) == 3


def test_files_that_are_not_a_saved_drafter_are_refused(tmp_path: Path):
    from safetensors.numpy import save_file

    with pytest.raises(FileNotFoundError):
        CorpusDrafter().load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="not a saved CorpusDrafter"):
        CorpusDrafter().load(tmp_path / "text")
    save_file({"tokens": ids(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"not written by CorpusDrafter\.save"):
        CorpusDrafter().load(tmp_path / "other")


@pytest.mark.parametrize(
    "broken",
    [
        {"lengths": np.array([3], np.int64)},
        {"lengths": np.array([-2], np.int64)},
        {"lengths": np.array([2**62, 2 - 2**62], np.int64)},
        {"scopes": np.array([], np.uint64)},
        {"gates": np.zeros(7, np.float32)},
        {"gates": "nan"},
        {"tokens": ids(-5, 2)},
        {"tokens": np.array([1.0, 2.0])},
    ],
    ids=lambda broken: "-".join(f"{k}" for k in broken),
)
def test_broken_arrays_are_refused_and_change_nothing(tmp_path: Path, broken: dict[str, Any]):
    from safetensors.numpy import save_file

    if native.cpu is None:
        pytest.skip(f"native module not built: {native.missing.get('cpu')}")
    names = ("tokens", "lengths", "scopes", "evidence", "gates")
    source = native.cpu.CorpusIndex(100)
    source.observe(ids(1, 2))
    arrays = dict(zip(names, source.export_content(), strict=True))
    if isinstance(broken.get("gates"), str):
        broken = {"gates": np.full_like(arrays["gates"], np.nan)}
    save_file(arrays | broken, tmp_path / "broken", metadata={"format": "specfuse corpus 1"})
    drafter = filled()
    before = proposals(drafter)
    with pytest.raises(ValueError):
        drafter.load(tmp_path / "broken")
    assert proposals(drafter) == before


def test_directories_are_named_as_what_they_are(tmp_path) -> None:
    drafter = CorpusDrafter()
    for use in (drafter.load, drafter.save):
        with pytest.raises(IsADirectoryError, match="Is a directory"):
            use(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"No such directory: .*missing'"):
        drafter.save(tmp_path / "missing" / "corpus.st")
