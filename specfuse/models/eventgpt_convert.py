"""Reads a checkpoint of the original EventGPT: its names to those of ``EventGptForConditionalGeneration``.

Source: github.com/XduSyL/EventGPT, ``model/EventChatModel.py`` and ``inference.py``.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig

from specfuse.models.checkpoint import load_tokenizer, read_config
from specfuse.models.eventgpt import EventGptConfig, EventGptForConditionalGeneration
from specfuse.models.eventgpt_processor import EVENT_TOKEN, EventGptProcessor

PREFIXES = {
    "model.visual_tower.visual_tower.vision_model.": "model.visual_tower.",
    "model.visual_projector.": "model.visual_projector.",
    "model.feature_adaptor.": "model.feature_adaptor.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
    "lm_head.": "lm_head.",
}
_COMPUTED = (".rotary_emb.inv_freq", ".embeddings.position_ids")  # buffers that older versions saved
_HEAD_WIDTH = 64  # of every CLIP tower


class Converted(NamedTuple):
    """What was written, and the names in the checkpoint that have no place in the model."""

    directory: Path
    parameters: int
    unmatched: list[str]


def convert_eventgpt(checkpoint: str | os.PathLike[str], directory: str | os.PathLike[str]) -> Converted:
    """Writes an original checkpoint as a directory for ``from_pretrained``, with its processor.

    One more token is added behind the checkpoint's: ``<event>``. Its row of the head is that of token 0,
    ``<unk>``, so that it is as unlikely an answer.

    Args:
        checkpoint: directory with ``config.json``, tokenizer files, and ``.safetensors`` or ``.bin`` files,
            sharded or not. ``.bin`` files are read without executing what they hold.
        directory: to write; created if missing.

    Raises:
        FileNotFoundError: no such checkpoint.
        FileExistsError: the directory holds files.
        ValueError: broken or missing files, or weights without those of a part of the model.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty")
    given = read_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    # As the original's inference.py does, with the same defaults.
    if given.get("mm_use_im_patch_token", True):
        tokenizer.add_tokens(["<ev_patch>"], special_tokens=True)
    if given.get("mm_use_im_start_end", False):
        tokenizer.add_tokens(["<ev_start>", "<ev_end>"], special_tokens=True)
    tokenizer.add_tokens([EVENT_TOKEN], special_tokens=True)
    weights, unmatched = renamed(read_weights(Path(checkpoint)))
    config = _config(given, weights, tokenizer.convert_tokens_to_ids(EVENT_TOKEN), len(tokenizer))
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        missing = config.text_config.vocab_size - len(weights[name])
        weights[name] = torch.cat([weights[name], weights[name][:1].expand(missing, -1)])
    with torch.device("meta"):
        model = EventGptForConditionalGeneration(config)
    _check_shapes(model.state_dict(), weights)
    model.load_state_dict(weights, assign=True)
    model.save_pretrained(directory)
    size = config.vision_config.image_size
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    EventGptProcessor(images, tokenizer, event_tokens=config.event_tokens).save_pretrained(directory)
    return Converted(directory, sum(value.numel() for value in weights.values()), unmatched)


def renamed(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under this package's names, and the names that have none."""
    found, unmatched = {}, []
    for name, value in weights.items():
        if name.endswith(_COMPUTED):
            continue
        old = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if old is None:
            unmatched.append(name)
        else:
            found[PREFIXES[old] + name.removeprefix(old)] = value
    return found, sorted(unmatched)


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's files; nothing in them is executed.

    Raises:
        ValueError: no weights, or a missing or broken file.
    """
    files: list[str] = []
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{name}.index.json"
        if index.exists():
            try:
                files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise ValueError(f"{index} is no index of weights: {str(error)[:80]}") from None
        elif (directory / name).exists():
            files = [name]
        if files:
            break
    if not files:
        raise ValueError(
            f"{directory} has neither model.safetensors nor pytorch_model.bin, nor an index of them"
        )
    weights: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{directory}: the index names {name!r}, a file outside of the directory")
        weights |= _read_file(directory / name)
    return weights


def _read_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
            raise ValueError("it holds no dictionary of tensors")
        return found
    except (
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        SafetensorError,
    ) as error:
        text = " ".join(str(error).split())[:160]
        raise ValueError(f"{path} can not be read: {text or type(error).__name__}") from None


def _config(given: dict[str, Any], weights: dict[str, Tensor], event: int, tokens: int) -> EventGptConfig:
    """The model's config: LLaMA's from the checkpoint's, CLIP's from the shapes of its weights."""
    needed = {
        "patches": "model.visual_tower.embeddings.patch_embedding.weight",
        "positions": "model.visual_tower.embeddings.position_embedding.weight",
        "inner": "model.visual_tower.encoder.layers.0.mlp.fc1.weight",
        "words": "model.language_model.embed_tokens.weight",
        "head": "lm_head.weight",
    }
    if missing := [name for name in needed.values() if name not in weights]:
        raise ValueError(f"the checkpoint lacks what becomes {missing[0]}")
    shapes = {part: weights[name].shape for part, name in needed.items()}
    width, _, patch, _ = shapes["patches"]
    layers = {name.split(".")[4] for name in weights if name.startswith("model.visual_tower.encoder.layers.")}
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes["inner"][0],
        num_hidden_layers=len(layers),
        num_attention_heads=max(width // _HEAD_WIDTH, 1),
        image_size=math.isqrt(shapes["positions"][0] - 1) * patch,
        patch_size=patch,
    )
    known = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version", "dtype"}
    text = {name: value for name, value in given.items() if name in known}
    text["vocab_size"] = max(shapes["words"][0], shapes["head"][0], tokens)
    return EventGptConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text),
        event_token_index=event,
        dtype=weights["lm_head.weight"].dtype,
    )


def _check_shapes(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    if missing := sorted(wanted.keys() - weights.keys()):
        raise ValueError(f"the checkpoint lacks {len(missing)} weights, first what becomes {missing[0]}")
    for name, value in wanted.items():
        if value.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, the config says {tuple(value.shape)}"
            raise ValueError(f"the checkpoint's weight for {name} is {shapes}")
