"""Tuned configurations: the nearest size wins, a GPU's own file before the untuned one, overrides end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specfuse.kernels import tuned

CONFIGS = Path(__file__).resolve().parents[1] / "kernels" / "configs"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def write(name: str, **blocks: int) -> None:
        entries = [{"sizes": {"S": int(s[1:]), "N": 16}, "config": {"BLOCK": b}} for s, b in blocks.items()]
        (tmp_path / name).write_text(json.dumps({"op": "some_op", "entries": entries}))

    write("some_op.json", S100=1, S10000=2)
    write("some_op.nvidia-h200.json", S100=3)
    monkeypatch.setattr(tuned, "CONFIGS", tmp_path)
    monkeypatch.setattr(tuned, "gpu_name", lambda device: None)
    tuned._entries.cache_clear()
    tuned._nearest.cache_clear()
    yield tmp_path
    tuned._entries.cache_clear()
    tuned._nearest.cache_clear()


def test_the_nearest_size_wins_on_a_log_scale(folder: Path) -> None:
    assert tuned.config("some_op", {"S": 900, "N": 16}) == {"BLOCK": 1}
    assert tuned.config("some_op", {"S": 1100, "N": 16}) == {"BLOCK": 2}
    assert tuned.config("some_op", {"S": 0, "unknown": 3}) == {"BLOCK": 1}


def test_a_gpu_has_its_own_file_or_the_untuned_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "gpu_name", lambda device: "nvidia-h200")
    assert tuned.config("some_op", {"S": 10000}) == {"BLOCK": 3}
    monkeypatch.setattr(tuned, "gpu_name", lambda device: "nvidia-other")
    assert tuned.config("some_op", {"S": 10000}) == {"BLOCK": 2}


def test_an_override_ends_with_its_block(folder: Path) -> None:
    with tuned.override("some_op", {"BLOCK": 8}):
        with pytest.raises(RuntimeError), tuned.override("some_op", {"BLOCK": 9}):
            assert tuned.config("some_op", {"S": 1}) == {"BLOCK": 9}
            raise RuntimeError
        assert tuned.config("some_op", {"S": 1}) == {"BLOCK": 8}
    assert tuned.config("some_op", {"S": 1}) == {"BLOCK": 1}


def test_an_op_without_a_file_is_named(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="other_op"):
        tuned.config("other_op", {"S": 1})


def test_device_names_become_file_names() -> None:
    assert tuned._slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert tuned.config_file("verify_tree", "nvidia-h200").name == "verify_tree.nvidia-h200.json"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda p: p.name)
def test_shipped_files_are_whole(path: Path) -> None:
    table = json.loads(path.read_text())
    op, _, gpu = path.name.removesuffix(".json").partition(".")
    assert table["op"] == op and (table["gpu"] or "") == gpu
    assert table["measured"] is bool(gpu), "figures of one GPU are measured, the untuned file is not"
    assert table["entries"], "an empty table has no nearest entry"
    keys = {frozenset(entry["sizes"]) for entry in table["entries"]}
    assert len(keys) == 1, "all entries are keyed by the same sizes"
