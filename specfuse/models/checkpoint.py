"""Models from local directories, with one clear line for each way a directory can be wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerFast,
        VideoLlavaForConditionalGeneration,
        VideoLlavaProcessor,
    )

    from specfuse.models.eventgpt import EventGptForConditionalGeneration
    from specfuse.models.eventgpt_processor import EventGptProcessor


def load_video_llava(
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> tuple[VideoLlavaForConditionalGeneration, VideoLlavaProcessor]:
    """Loads a Video-LLaVA and its processor from a local directory; nothing is fetched.

    Args:
        directory: as written by ``save_pretrained``.
        dtype: of the weights; "auto" keeps the one they were saved in.
        device: where to put the model.

    Returns:
        ``VideoLlavaForConditionalGeneration`` in eval mode, and its ``VideoLlavaProcessor``.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: no or broken config, another kind of model, missing or broken weights or processor files.
    """
    from transformers import AutoProcessor, VideoLlavaForConditionalGeneration

    model_type = read_config(directory).get("model_type")
    if model_type != "video_llava":
        raise ValueError(f"{directory} holds a {model_type!r} model, not a 'video_llava' one")
    model = _weights(VideoLlavaForConditionalGeneration, directory, dtype)
    with _explained(directory, "processor files"):
        processor = AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if type(processor).__name__ != "VideoLlavaProcessor":
        raise ValueError(f"{directory} has no VideoLlavaProcessor files, only a {type(processor).__name__}")
    return model.to(device).eval(), processor


def load_draft_model(
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Loads any model that can draft: the class its config names, else the causal language model of its type.

    Raises:
        FileNotFoundError, ValueError: as for :func:`load_video_llava`, and for an EventGPT.
    """
    import transformers

    config = read_config(directory)
    if config.get("model_type") == "eventgpt":
        raise ValueError(f"{directory} holds an EventGPT: it drafts from events, with specfuse.EventDrafter")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{directory}: architectures must be a list of names, got {names!r}")
    model_class: Any = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
    # The name comes from a file: it may be that of any other thing in transformers.
    known = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not known or not model_class.can_generate():
        model_class = transformers.AutoModelForCausalLM
    return _weights(model_class, directory, dtype).to(device).eval()


def load_eventgpt(
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> tuple[EventGptForConditionalGeneration, EventGptProcessor]:
    """Loads an EventGPT in eval mode and its processor from a local directory; nothing is fetched.

    Raises:
        FileNotFoundError, ValueError: as for :func:`load_video_llava`.
    """
    from specfuse.models.eventgpt import EventGptForConditionalGeneration
    from specfuse.models.eventgpt_processor import EventGptProcessor

    model_type = read_config(directory).get("model_type")
    if model_type != "eventgpt":
        raise ValueError(f"{directory} holds a {model_type!r} model, not an 'eventgpt' one")
    model = _weights(EventGptForConditionalGeneration, directory, dtype)
    with _explained(directory, "processor files"):
        processor = EventGptProcessor.from_pretrained(directory, local_files_only=True)
    return model.to(device).eval(), processor


def load_tokenizer(directory: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a local model directory.

    Raises:
        FileNotFoundError, ValueError: as for :func:`load_video_llava`.
    """
    from transformers import AutoTokenizer

    read_config(directory)
    with _explained(directory, "tokenizer files"):
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of a model directory.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: a file, or a directory without a valid config.
    """
    path = Path(directory)
    if not path.exists():
        raise FileNotFoundError(2, "no such model directory", str(directory))
    if not path.is_dir():
        raise ValueError(f"{directory} is a file, a model directory is needed")
    if not (path / "config.json").exists():
        raise ValueError(f"{directory} is no model directory: it has no config.json")
    try:
        config = json.loads((path / "config.json").read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path / 'config.json'} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.json'} is not a JSON object")
    return config


def _weights(model_class: Any, directory: str | os.PathLike[str], dtype: torch.dtype | str) -> Any:
    with _explained(directory, "weights"):
        # Not given, transformers asks at the terminal whether a directory's own code may run.
        model, info = model_class.from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True, trust_remote_code=False
        )
    # from_pretrained draws missing weights at random and only warns: the answers would be noise.
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{directory}: the weights lack {missing[0]}{more}")
    return model


def _where(directory: str | os.PathLike[str], error: KeyError) -> str:
    """Names the fields of config.json that hold what was not known."""
    try:
        found = json.loads((Path(directory) / "config.json").read_text())
    except (OSError, ValueError):
        return ""
    parts, names = [("", found)], []
    while parts:
        name, value = parts.pop()
        if isinstance(value, dict):
            parts += [(f"{name}.{key}".lstrip("."), part) for key, part in value.items()]
        elif error.args and value == error.args[0]:
            names.append(name)
    return f", which config.json gives as {' and '.join(sorted(names))}" if names else ""


@contextmanager
def _explained(directory: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turns whatever transformers raises on broken files into one line that names the directory."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, KeyError):  # whose text is the key alone
            version = metadata.version("transformers")
            text = f"transformers {version} does not know {text}{_where(directory, error)}"
        raise ValueError(
            f"{directory}: {what} can not be loaded: {text[:200] or type(error).__name__}"
        ) from error
