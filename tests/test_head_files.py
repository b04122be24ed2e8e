"""A head's directory: what is written is read, and what is wrong with one is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_head import head_for
from tiny_models import tiny_video_llava, video_inputs

import specfuse
from specfuse import HeadDrafter
from specfuse.drafters import holds_head


@pytest.fixture(scope="module")
def model():
    return tiny_video_llava(seed=7, eos=False)


def test_files(model, tmp_path: Path):
    head = head_for(model, shortlist=20)
    head.save_pretrained(tmp_path)
    assert holds_head(tmp_path) and not holds_head(tmp_path.parent)
    read = HeadDrafter.from_pretrained(tmp_path, model, depth=2)
    for name, value in head.state_dict().items():
        kept = value.half().float() if value.is_floating_point() else value
        assert torch.equal(read.head.state_dict()[name], kept), name
    assert read.depth == 2
    inputs = video_inputs(model, 1)
    fast = specfuse.generate(model, read, **inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(fast, model.generate(**inputs, max_new_tokens=12, do_sample=False))


def test_a_target_of_other_sizes_is_refused(model, tmp_path: Path):
    head_for(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hidden size 64, this one has 32"):
        HeadDrafter.from_pretrained(tmp_path, tiny_video_llava(hidden=32))
    with pytest.raises(ValueError, match="vocabulary 128, this one has 96"):
        HeadDrafter.from_pretrained(tmp_path, tiny_video_llava(vocab=96))


def broken(directory: Path, how: str) -> None:
    config, weights = directory / "config.json", directory / "model.safetensors"
    values = json.loads(config.read_text())
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:500])
    elif how == "gone":
        weights.unlink()
    elif how == "other sizes":
        config.write_text(json.dumps(values | {"inner": 56}))
    elif how == "bad tokens":
        tensors = load_file(weights)
        save_file(tensors | {"shortlist": torch.full((20,), 128)}, weights)
    elif how == "bad size":
        config.write_text(json.dumps(values | {"heads": 0}))
    elif how == "long":
        config.write_text(json.dumps(values | {"shortlist": 129}))
    elif how == "odd heads":
        config.write_text(json.dumps(values | {"heads": 5}))
    elif how == "less":
        config.write_text(json.dumps({k: v for k, v in values.items() if k != "inner"}))
    elif how == "other kind":
        config.write_text(json.dumps(values | {"model_type": "llama"}))
    elif how == "no JSON":
        config.write_text("{")


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("cut", "model.safetensors is broken or belongs to another config"),
        ("gone", "no weights"),
        ("other sizes", "model.safetensors is broken or belongs to another config"),
        ("bad tokens", "shortlist must hold tokens from 0 to 127"),
        ("long", "shortlist must be at most 128 tokens, got 129"),
        ("bad size", "heads must be a number of at least 1, got 0"),
        ("odd heads", "width must be a multiple of 2 [*] heads = 10, got 64"),
        ("less", "lacks 'inner'"),
        ("other kind", "holds a 'llama' model, not a draft head"),
        ("no JSON", "is not valid JSON"),
    ],
)
def test_broken_files_are_named(model, tmp_path: Path, how: str, text: str):
    head_for(model, shortlist=20).save_pretrained(tmp_path)
    broken(tmp_path, how)
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        HeadDrafter.from_pretrained(tmp_path, model)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"depth": 0}, "depth and branching must be at least 1, got 0 and 3"),
        ({"branching": 0}, "depth and branching"),
        ({"min_prob": 1.0}, "min_prob must lie in"),
        ({"level_prob": -0.1}, "level_prob must lie in"),
    ],
)
def test_wrong_options_are_named(model, options, text):
    with pytest.raises(ValueError, match=text):
        HeadDrafter(head_for(model), model, **options)
