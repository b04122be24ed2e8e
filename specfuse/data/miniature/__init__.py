"""The miniature models that come with the package: trained, small, checked before they are read.

from specfuse.data import miniature
model, processor = miniature.load_target()

`python -m specfuse.data.miniature` checks what is there; with NAME=DIRECTORY it puts trained models in.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import VideoLlavaForConditionalGeneration, VideoLlavaProcessor

    from specfuse.drafters import CorpusDrafter

ROOT = Path(__file__).parent
NAMES = (
    *("tiny-video-llava", "tiny-corpus", "tiny-head", "tiny-head-events"),
    *("tiny-eventgpt", "tiny-eventgpt-naive"),
)
MOST_BYTES = 14_000_000  # of all together: the package stays a small download
CORPUS_FILE = "answers.safetensors"
MANIFEST = "manifest.json"

# What ships of a trained directory: what loading reads, and its card. States to resume from stay behind.
_SHIPPED = {".json", ".safetensors", ".md", ".png", ".jinja"}

Manifest = dict[str, dict[str, dict[str, Any]]]  # model -> file -> {"bytes": ..., "sha256": ...}


def shipped(root: Path = ROOT) -> list[str]:
    """The models that are there, in the order of ``NAMES``."""
    there = read_manifest(root)
    return [name for name in NAMES if name in there]


def directory(name: str, root: Path = ROOT) -> Path:
    """The directory of a shipped model, every file of it compared with the manifest.

    Args:
        name: one of ``NAMES``.
        root: where the manifest is.

    Raises:
        ValueError: there is no model of that name, or a file is truncated or changed; names the file.
        FileNotFoundError: the model did not come with this installation, or a file of it is missing.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    files = read_manifest(root).get(name)
    if files is None:
        raise FileNotFoundError(2, "this model does not come with the package yet", str(root / name))
    for file, expected in files.items():
        _check(root / name / file, expected)
    return root / name


def load_target(
    root: Path = ROOT,
) -> tuple[VideoLlavaForConditionalGeneration, VideoLlavaProcessor]:
    """The trained Video-LLaVA in float32 and eval mode, and its processor; raises as :func:`directory`."""
    import torch

    from specfuse.models.checkpoint import load_video_llava

    return load_video_llava(directory("tiny-video-llava", root), dtype=torch.float32)


def load_corpus(root: Path = ROOT) -> CorpusDrafter:
    """A drafter that remembers the target's answers about training clips; raises as :func:`directory`."""
    from specfuse.drafters import CorpusDrafter

    return CorpusDrafter().load(directory("tiny-corpus", root) / CORPUS_FILE)


def read_manifest(root: Path = ROOT) -> Manifest:
    """Sizes and SHA-256 of every shipped file; empty where nothing ships.

    Raises:
        ValueError: the manifest is broken.
    """
    path = root / MANIFEST
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        entries = [entry for files in content.values() for entry in files.values()]
        if all(isinstance(e["bytes"], int) and isinstance(e["sha256"], str) for e in entries):
            return content
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} is no manifest of models or is broken; install the package again")


def ship(sources: Mapping[str, str | os.PathLike[str]], root: Path = ROOT) -> Manifest:
    """Copies trained models into the package and renews its manifest.

    Args:
        sources: directory of each model, by its name.
        root: of the package's models.

    Raises:
        ValueError: a name that does not ship, an empty directory, or more than ``MOST_BYTES`` altogether.
        FileNotFoundError: no such directory.
    """
    manifest = read_manifest(root)
    for name, source in sources.items():
        if name not in NAMES:
            raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
        if not Path(source).is_dir():
            raise FileNotFoundError(2, "no such model directory", str(source))
        files = sorted(path for path in Path(source).iterdir() if path.suffix in _SHIPPED)
        if not files:
            raise ValueError(f"{source} holds nothing that ships")
        manifest[name] = {path.name: _entry(path) for path in files}
    total = sum(entry["bytes"] for files in manifest.values() for entry in files.values())
    if total > MOST_BYTES:
        raise ValueError(f"all models together take {total:,} bytes, {MOST_BYTES:,} may ship")
    for name, source in sources.items():
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir(parents=True)
        for file in manifest[name]:
            shutil.copyfile(Path(source) / file, root / name / file)
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _entry(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _check(path: Path, expected: dict[str, Any]) -> None:
    if not path.is_file():
        raise FileNotFoundError(2, "a file of the shipped model is missing", str(path))
    found = _entry(path)
    if found["bytes"] != expected["bytes"]:
        raise ValueError(f"{path} holds {found['bytes']} bytes instead of {expected['bytes']}: truncated?")
    if found["sha256"] != expected["sha256"]:
        raise ValueError(f"{path} is not the file that was shipped: its SHA-256 differs")
