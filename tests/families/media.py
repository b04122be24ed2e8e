"""A prompt with a picture or a sound for any class that takes one, found by trying the known shapes.

A model that is given one placeholder too few says how many it wants; so each shape is tried until the model
runs, and then only counts if another picture gives other logits.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .errors import described
from .media_shapes import pictures, sounds, vision_of
from .prompts import Prompt, words

_IMAGE = ("image_token_id", "image_token_index", "image_patch_id", "media_placeholder_token_id")
_IMAGE += ("video_token_index",)
_SOUND = ("audio_token_id", "audio_token_index")
_BEFORE = ("vision_start_token_id", "boi_token_index", "boi_token_id", "image_start_token_id")
_BEFORE += ("start_image_token_id", "image_begin_token_id")
_AFTER = (
    "vision_end_token_id",
    "eoi_token_index",
    "eoi_token_id",
    "image_end_token_id",
    "end_image_token_id",
)
_WANTED = re.compile(r"tokens: (?P<tokens>\d+).*?features:? ?(?P<features>\d+)")


def media_prompts(model: PreTrainedModel) -> tuple[list[Prompt], str]:
    """A prompt with one picture, one with one sound, where the class takes these; and why one is missing."""
    parameters = inspect.signature(model.forward).parameters
    prompts, missing = [], []
    for name, key, shapes in (("pixels", "pixel_values", pictures), ("sound", "input_features", sounds)):
        if key not in parameters:
            continue
        problems: list[str] = []
        for media in shapes(model, parameters):
            inputs, problem = _fitted(model, media, parameters, key)
            if inputs is not None:
                prompts += _alone_and_padded(model, name, inputs)
                break
            problems.append(problem)
        else:
            missing.append(f"no prompt with {name}: {problems[0]}")
    return prompts, "; ".join(missing)


# Inputs that have a column for each id.
_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask")
_COLUMNS += ("image_embeds_position_mask", "image_attention_mask")


def _alone_and_padded(model: PreTrainedModel, name: str, inputs: dict[str, Tensor]) -> list[Prompt]:
    """The prompt, and two rows of it: the second has two words less and another picture."""
    length = inputs["input_ids"].shape[1]
    rows = {}
    for key, value in inputs.items():
        other = -value if value.is_floating_point() else value.clone()
        if key in _COLUMNS:
            other[:, :2] = 0
        rows[key] = torch.cat([value, other])
    alone = Prompt(name, inputs, 16, length)
    try:
        _last_logits(model, rows)
    except Exception:  # some take one picture at a time
        return [alone]
    return [alone, Prompt(f"{name} padded", rows, 12, length)]


def _fitted(
    model: PreTrainedModel, media: dict[str, Tensor], parameters: Collection[str], key: str
) -> tuple[dict[str, Any] | None, str]:
    """Inputs that the model takes, with as many placeholders as it asks for."""
    wide = getattr(model.config.get_text_config(decoder=True), "hidden_size", 1)
    counts, tried, problem = [1], set(), ""
    while counts:
        wanted = counts.pop(0)
        tried.add(wanted)
        inputs = {**_text(model, wanted, parameters, key), **media}
        try:
            logits = _last_logits(model, inputs)
            if logits.shape[0] > 1:
                raise ValueError(f"tokens: {wanted}, features: {logits.shape[0] + wanted - 1}")
        except Exception as error:
            text = described(error)
            found = _WANTED.search(text)
            problem = problem if problem and found is None else text
            if found is not None:
                asked = int(found["features"])
                # Some count numbers, not vectors.
                more = [asked // wide, asked] if asked % wide == 0 else [asked]
                counts += [count for count in more if 0 < count <= 400 and count not in tried]
            continue
        other = {**inputs, key: -2 * inputs[key].flip(-1)}
        if torch.equal(_last_logits(model, other), logits):
            return None, f"other {key} give the same logits"
        return inputs, ""
    return None, problem


def _text(model: PreTrainedModel, count: int, parameters: Collection[str], key: str) -> dict[str, Tensor]:
    """Ids with ``count`` placeholders among words, and what tells them from words."""
    config = model.config
    picture = key == "pixel_values"
    placeholder = _first(config, _IMAGE if picture else _SOUND)
    seen = [] if placeholder is None else [placeholder] * count
    seen = [*_one(config, _BEFORE), *seen, *_one(config, _AFTER)] if picture else seen
    ids = torch.cat([words(3, 31), torch.tensor([seen], dtype=torch.int64), words(6, 37)], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    types = (ids == (-1 if placeholder is None else placeholder)).long()
    if "mm_token_type_ids" in parameters:
        inputs["mm_token_type_ids"] = types if picture else 3 * types
    if "token_type_ids" in parameters:
        # PaliGemma's types tell prompt from answer: all of a prompt is of type 0.
        inputs["token_type_ids"] = torch.zeros_like(ids) if "pali" in config.model_type else types
    return inputs | _companions(config, ids, parameters) if picture else inputs


def _companions(config: Any, ids: Tensor, parameters: Collection[str]) -> dict[str, Tensor]:
    """What single families want besides."""
    inputs: dict[str, Tensor] = {}
    if "qformer_input_ids" in parameters:
        inputs |= {"qformer_input_ids": words(4, 41), "qformer_attention_mask": torch.ones(1, 4).long()}
    if "image_embeds_position_mask" in parameters:
        marked = torch.arange(ids.shape[1]) - 1
        inputs["image_embeds_position_mask"] = ((marked >= 0) & (marked < config.latent_query_num))[None]
    if "image_attention_mask" in parameters:
        inputs["image_attention_mask"] = torch.ones(1, ids.shape[1], 1, dtype=torch.long)
    if "cross_attention_mask" in parameters:
        tiles = getattr(vision_of(config), "max_num_tiles", 4)
        inputs["cross_attention_mask"] = torch.ones(1, ids.shape[1], 1, tiles, dtype=torch.long)
    return inputs


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((token for token in found if isinstance(token, int)), None)


def _one(config: Any, names: tuple[str, ...]) -> list[int]:
    token = _first(config, names)
    return [] if token is None else [token]


def _last_logits(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        logits = model(**inputs).logits
    # More than one row: as many more as positions that the model has made of a single placeholder.
    return logits[0, inputs["input_ids"].shape[1] - 1 :] if "input_features" in inputs else logits[:, -1]
