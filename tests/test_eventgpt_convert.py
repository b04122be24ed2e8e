"""``specfuse convert-eventgpt`` on synthetic checkpoints in the original layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import finish, llama_config
from transformers import CLIPVisionConfig

from specfuse.cli.main import run
from specfuse.data.world import clip, events
from specfuse.models.checkpoint import load_eventgpt
from specfuse.models.eventgpt import EventGptConfig, EventGptForConditionalGeneration
from specfuse.models.eventgpt_convert import PREFIXES, convert_eventgpt, read_weights
from specfuse.train.tokenizer import train_tokenizer

TOKENS = 400


@pytest.fixture(scope="module")
def model() -> EventGptForConditionalGeneration:
    """What the checkpoint holds, without a token for events."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=32,
        patch_size=8,
    )
    text = llama_config(vocab=TOKENS, hidden=48)
    config = EventGptConfig(vision_config=vision, text_config=text, event_token_index=0)
    return finish(EventGptForConditionalGeneration(config), 0, torch.float32, eos=True)


def original(model: EventGptForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Its weights under the original names, with the buffers and parts that some checkpoints hold."""
    back = {new: old for old, new in PREFIXES.items()}
    weights = {}
    for name, value in model.state_dict().items():
        new = max((prefix for prefix in back if name.startswith(prefix)), key=len)
        weights[back[new] + name.removeprefix(new)] = value.clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["model.visual_tower.visual_tower.vision_model.embeddings.position_ids"] = torch.arange(17)
    weights["model.query_embedder.weight"] = torch.ones(2, 2)
    return weights


def write_checkpoint(directory: Path, model: EventGptForConditionalGeneration, layout: str) -> Path:
    directory.mkdir(parents=True)
    train_tokenizer(clip(1).questions, TOKENS).save_pretrained(directory)
    text = model.config.text_config.to_dict()
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    config: dict[str, Any] = {name: text[name] for name in names}
    config |= {"model_type": "EventChat_llama", "vocab_size": TOKENS, "mm_use_im_start_end": True}
    config |= {"mm_visual_tower": "openai/clip-vit-large-patch14-336", "event_feature_adaptor": True}
    (directory / "config.json").write_text(json.dumps(config))
    weights = original(model)
    if layout == "safetensors":
        save_file(weights, directory / "model.safetensors")
    elif layout == "bin":
        torch.save(weights, directory / "pytorch_model.bin")
    else:
        places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(sorted(weights))}
        for file in set(places.values()):
            torch.save({n: w for n, w in weights.items() if places[n] == file}, directory / file)
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return directory


@pytest.mark.parametrize("layout", ["safetensors", "bin", "sharded bin"])
def test_round_trip_of_names(model: EventGptForConditionalGeneration, tmp_path: Path, layout: str) -> None:
    done = convert_eventgpt(write_checkpoint(tmp_path / "original", model, layout), tmp_path / "out")
    assert done.unmatched == ["model.query_embedder.weight"]
    again, processor = load_eventgpt(tmp_path / "out", dtype=torch.float32)
    wanted = model.state_dict()
    for name, value in again.state_dict().items():
        assert torch.equal(value[: len(wanted[name])], wanted[name]), name
    # <ev_patch>, <ev_start>, <ev_end>, <event>
    assert len(processor.tokenizer) == TOKENS + 4 == again.config.text_config.vocab_size
    assert processor.event_token_id == TOKENS + 3 == again.config.event_token_index
    assert processor.event_tokens == again.config.event_tokens == 5 + 17
    inputs = processor(text=processor.prompt("Why?"), events=events(1, 32, 8))
    logits = again(**inputs).logits
    assert torch.equal(logits[..., TOKENS:], logits[..., :1].expand(-1, -1, 4))
    assert again.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_a_bin_file_that_would_run_code(model: EventGptForConditionalGeneration, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    checkpoint = write_checkpoint(tmp_path / "original", model, "bin")
    torch.save({"model.norm.weight": Hostile()}, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin can not be read"):
        convert_eventgpt(checkpoint, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def broken(checkpoint: Path, how: str) -> str:
    """Breaks a sharded checkpoint; returns what the error must say."""
    index, shard = checkpoint / "pytorch_model.bin.index.json", checkpoint / "pytorch_model-0.bin"
    if how == "truncated":
        shard.write_bytes(shard.read_bytes()[:1000])
        return "pytorch_model-0.bin can not be read"
    if how == "shard missing":
        shard.unlink()
        return "pytorch_model-0.bin can not be read"
    if how == "no weights":
        index.unlink()
        return "has neither model.safetensors nor pytorch_model.bin"
    if how == "index":
        index.write_text("[]")
        return "is no index of weights"
    if how == "outside":
        index.write_text(json.dumps({"weight_map": {"a": "../a.bin"}}))
        return "a file outside of the directory"
    if how == "part missing":
        places = json.loads(index.read_text())["weight_map"]
        for file in set(places.values()):
            kept = {n: w for n, w in torch.load(checkpoint / file).items() if "feature_adaptor" not in n}
            torch.save(kept, checkpoint / file)
        return "lacks 2 weights, first what becomes model.feature_adaptor.bias"
    config = json.loads((checkpoint / "config.json").read_text()) | {"intermediate_size": 7}
    (checkpoint / "config.json").write_text(json.dumps(config))
    return r"gate_proj.weight is \(96, 48\), the config says \(7, 48\)"


@pytest.mark.parametrize(
    "how", ["truncated", "shard missing", "no weights", "index", "outside", "part missing", "config"]
)
def test_what_is_broken_is_named(model: EventGptForConditionalGeneration, tmp_path: Path, how: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "original", model, "sharded bin")
    match = broken(checkpoint, how)
    with pytest.raises(ValueError, match=match):
        convert_eventgpt(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_tower_in_the_checkpoint(model: EventGptForConditionalGeneration, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "original", model, "bin")
    kept = {n: w for n, w in read_weights(checkpoint).items() if "visual_tower" not in n}
    torch.save(kept, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lacks what becomes model\.visual_tower\.embeddings"):
        convert_eventgpt(checkpoint, tmp_path / "out")


def test_the_command(
    model: EventGptForConditionalGeneration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "original", model, "safetensors")
    arguments = ["convert-eventgpt", str(checkpoint), str(tmp_path / "out")]
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unmatched"] == ["model.query_embedder.weight"]
    assert run(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    assert run(["convert-eventgpt", str(checkpoint), str(tmp_path / "other")]) == 0
    assert "left out, the model has no place for it: model.query_embedder.weight" in capsys.readouterr().out
