"""A cheap answer, asked before every prefill: are these still the weights that cached tensors came from?"""

from __future__ import annotations

import hashlib
import itertools
import threading
import weakref
from array import array
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

SAMPLES_PER_TENSOR = 64

# Two models never share an entry, however alike their samples are; a model that is patched again finds its
# own.
_serial_numbers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_next_serial = itertools.count()
_serial_lock = threading.Lock()

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# State of adapters (PEFT) that changes the output without touching a tensor.
_ADAPTER_ATTRIBUTES = ("_disable_adapters", "_active_adapter", "scaling", "merged_adapters")


class ModelFingerprint:
    """Identity, memory, versions and a content sample of every tensor of a model, plus its configuration.

    Noticed are another model, replaced or added modules, moved or cast weights, everything that bumps a
    tensor's version counter (optimizer steps, `load_state_dict`), writes through `.data` that touch one of
    `SAMPLES_PER_TENSOR` evenly spread elements of any tensor (merging a LoRA does), changed configuration
    fields, and adapters switched on or off. Not noticed are a write through `.data` to a few elements that
    misses every sample, and code replaced inside modules.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._lock = threading.Lock()
        self._places: list[tuple[Any, ...]] | None = None
        self._places_text = b""
        self._samples: dict[Any, list[Tensor]] = {}
        with _serial_lock:
            if model not in _serial_numbers:
                _serial_numbers[model] = next(_next_serial)
            self._serial = _serial_numbers[model]

    def digest(self) -> bytes:
        """16 bytes that differ whenever a difference is noticed; costs about 1 ms for 300 tensors."""
        tensors, switches = _walk(self._model)
        places = [(t.data_ptr(), t.dtype, t.shape, t.device) for t in tensors]
        versions = [-1 if t.is_inference() else t._version for t in tensors]
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self._serial, switches)).encode())
        digest.update(array("q", versions).tobytes())
        digest.update(_config_state(self._model.config).encode())
        with self._lock:
            if places != self._places:
                self._samples = _sample_views(tensors)
                # Text is slow to make of so many parts, and seldom a new one.
                self._places, self._places_text = places, repr(places).encode()
            digest.update(self._places_text)
            for views in self._samples.values():
                digest.update(torch.cat(views).cpu().numpy().tobytes())
        return digest.digest()


def _walk(model: nn.Module) -> tuple[list[Tensor], list[Any]]:
    """Parameters and buffers in a fixed order, and the adapter switches; faster than `named_parameters`."""
    tensors: list[Tensor] = []
    switches: list[Any] = []
    stack: list[nn.Module] = [model]
    while stack:
        module = stack.pop()
        state = module.__dict__
        for group in (state["_parameters"], state["_buffers"]):
            tensors += [t for t in group.values() if t is not None]
        for name in _ADAPTER_ATTRIBUTES:
            if name in state:
                switches.append((len(tensors), name, state[name]))
        stack += [child for child in state["_modules"].values() if child is not None]
    return [t for t in tensors if t.device.type != "meta"], switches


def _sample_views(tensors: list[Tensor]) -> dict[Any, list[Tensor]]:
    """Flat views of a few elements of each tensor, as integers, grouped so that one `cat` reads a group."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        size = tensor.numel()
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if size == 0 or extent != size:  # not dense: no flat view
            continue
        # An odd step does not stay in one column of a matrix whose width is a power of two.
        step = max(1, size // SAMPLES_PER_TENSOR) | 1
        count = (size + step - 1) // step
        with torch.no_grad():
            view = tensor.detach().as_strided((count,), (step,))
        integer = _INTEGER_OF_SIZE.get(view.element_size())
        view = view.view(integer) if integer is not None else torch.view_as_real(view).flatten()
        groups[(view.dtype, view.device)].append(view)
    return dict(groups)


def _config_state(config: PreTrainedConfig) -> str:
    """Every plain field of a configuration and of those inside it: rope, vision layer, attention, ..."""
    parts = []
    for name, value in vars(config).items():
        parts.append(
            f"{name}=({_config_state(value)})" if isinstance(value, PreTrainedConfig) else f"{name}={value!r}"
        )
    return ";".join(parts)
