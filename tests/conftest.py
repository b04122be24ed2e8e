"""Fixtures and marks shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    # The models of the tests are tiny: more threads only wait for each other.
    torch.set_num_threads(1)
    # Child processes (command line, Triton interpreter) follow.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests marked slow or gpu unless ``-m`` speaks of them; gpu tests need a device anyway."""
    expression = config.getoption("markexpr", default="")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        for mark in ("slow", "gpu"):
            if mark in item.keywords and mark not in expression and not _named(config, item):
                item.add_marker(pytest.mark.skip(reason=f"marked {mark}; run with -m {mark}"))


def _named(config: pytest.Config, item: pytest.Item) -> bool:
    """True for a test whose own node id was given on the command line."""
    return any("::" in argument and item.nodeid.startswith(argument) for argument in config.args)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of recorded real data; it lies beside the repository or at SPECFUSE_SHARED_DATA."""
    folder = Path(os.environ.get("SPECFUSE_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no recorded data at {folder} (set SPECFUSE_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory written by ``specfuse init-tiny``."""
    from specfuse.models.tiny import init_tiny

    return init_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def drawn_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of clips that some module has drawn already."""
    return tmp_path_factory.mktemp("drawn")


@pytest.fixture(scope="module")
def world_cache(drawn_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A module's cache of the driving world: small blocks, events of few pictures a second.

    What is drawn is shared between modules; answers and features, which depend on weights, are not.
    """
    from specfuse.train import clip_store, event_store

    cache = tmp_path_factory.mktemp("world")
    for block in drawn_clips.iterdir():
        os.link(block, cache / block.name)
    event_store._version.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_store, "RATE", 8)
        for store in (clip_store, event_store):
            patch.setattr(store, "BLOCK", 2)
        yield cache
    event_store._version.cache_clear()
    for block in cache.glob("*.npz"):
        if not (drawn_clips / block.name).exists():
            os.link(block, drawn_clips / block.name)
