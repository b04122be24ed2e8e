"""Small random models of the generative classes of the installed transformers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .overrides import FLOAT32, MODEL_TYPES, VARIANTS
from .shrink import Shrinker

MAPPINGS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
# One encoder-decoder for each way a model can be one: these must be refused.
ENCODER_DECODERS = {"T5ForConditionalGeneration": "t5", "BartForConditionalGeneration": "bart"}
ENCODER_DECODERS |= {"WhisperForConditionalGeneration": "whisper"}


def classes() -> dict[str, list[str]]:
    """Name of every generative class -> the model types that it is the class of."""
    found: dict[str, list[str]] = {}
    for mapping in MAPPINGS:
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
        for model_type, name in names.items():
            for one in name if isinstance(name, (tuple, list)) else (name,):
                types = found.setdefault(one, [])
                types += [model_type] if model_type not in types else []
    for name, model_type in ENCODER_DECODERS.items():
        found.setdefault(name, [model_type])
    for name in VARIANTS:
        if plain(name) in found:
            found[name] = found[plain(name)]
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def plain(name: str) -> str:
    """Name of the class behind a variant's."""
    return name.partition(" (")[0]


def model_class(name: str, model_type: str) -> type[PreTrainedModel]:
    """The class itself; some are in their module but not at the top of the package."""
    name = plain(name)
    if hasattr(transformers, name):
        return getattr(transformers, name)
    folder = CONFIG_MAPPING[model_type].__module__.rsplit(".", 1)[0]
    module = importlib.import_module(f"{folder}.modeling_{folder.rsplit('.', 1)[1]}")
    return getattr(module, name)


def small_config(name: str, model_type: str) -> PreTrainedConfig:
    """A small configuration for one class."""
    given = dict(MODEL_TYPES.get(model_type, {}))
    given |= VARIANTS.get(name, {})
    config = CONFIG_MAPPING[model_type]
    default = config(**given.pop("default", {}))
    wanted = getattr(model_class(name, model_type), "config_class", None)
    if wanted is not None and not isinstance(default, wanted):
        inner = default.get_text_config(decoder=True)
        if isinstance(inner, wanted):
            # A class of the text part alone (Qwen3_5ForCausalLM) is made of the text configuration.
            default = inner
            given = {name.removeprefix("text_config."): value for name, value in given.items()}
    return Shrinker(given).shrink(default)


def build(name: str, model_type: str, seed: int = 0) -> PreTrainedModel:
    """A small random model in float64 and eval mode, without an EOS; its weights as the class draws them."""
    torch.manual_seed(seed)
    made = model_class(name, model_type)
    config = small_config(name, model_type)
    for part in (config, *_parts(config)):
        # Grouped matrix products of experts take no float64.
        part._experts_implementation = "eager"
    config._attn_implementation = "sdpa" if made._supports_sdpa else "eager"
    try:
        model = made(config)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        config._attn_implementation = "eager"
        model = made(config)
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > 20_000_000:
        raise MemoryError(f"{size / 1e6:.0f} million parameters: some field was not shrunk")
    # Eager attention takes its softmax in float32, where the lowest float64 of a mask is -inf: rows of NaN.
    eager = model.config._attn_implementation != "sdpa" or model_type in FLOAT32
    model.to(torch.float32 if eager else torch.float64).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield value
            yield from _parts(value)


SCALES = ((3.0, 0.5), (3.0, 0.1), (8.0, 0.1), (8.0, 0.02), (3.0, 2.0), (20.0, 0.02))
"""Gains of matrices and standard deviations of embeddings to try: some class repeats itself with each."""


def randomize(model: PreTrainedModel, gain: float, embedding: float, seed: int = 0) -> None:
    """Redraws matrices with standard deviation ``gain / sqrt(fan_in)``, so that the model has opinions."""
    generator = torch.Generator().manual_seed(seed)
    tables = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    for name, parameter in _matrices(model):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = embedding if name in tables else gain / _fan_in(parameter) ** 0.5
        with torch.no_grad():
            parameter.copy_((noise * scale).to(parameter.dtype))
    for name, parameter in model.named_parameters():
        # Gates of cross attention begin closed: nothing of a picture would come through.
        if any(word in name for word in ("gate", "alpha")) and not parameter.any():
            with torch.no_grad():
                parameter.fill_(0.7)


def _matrices(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    kept = ("norm", "A_log", "dt_", "bias", "scale", "decay", "time_")
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and parameter.is_floating_point() and not any(k in name for k in kept):
            yield name, parameter


def _fan_in(parameter: Tensor) -> int:
    return parameter[0].numel() if parameter.dim() > 3 else parameter.shape[-1]


def special_tokens(config: Any) -> list[int]:
    """Ids of placeholders anywhere in a configuration."""
    found: set[int] = set()
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            found.update(special_tokens(value))
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index")) and isinstance(value, int) and value > 2:
            found.add(value)
    return sorted(found)


def placeholder_tokens(config: PreTrainedConfig) -> list[int]:
    """Ids that must not be in an answer: a model that is given one looks for its pixels."""
    with_towers = any(name != "text_config" for name, _ in _named_parts(config))
    return special_tokens(config) if with_towers else []


def _named_parts(config: PreTrainedConfig) -> list[tuple[str, PreTrainedConfig]]:
    return [(name, value) for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)]
