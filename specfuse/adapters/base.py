"""What all adapters share: Hugging Face's ``save_pretrained`` and ``from_pretrained``, and their start."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


class AdapterModel(PreTrainedModel):
    """A small model between a drafter and a target.

    ``loss`` of training, kinds of input and files are :mod:`specfuse.train.adapter`'s business; a class here
    says what is computed and what it starts as.
    """

    base_model_prefix = ""
    main_input_name = "x"
    _no_split_modules: list[str] = []

    def __init__(self, config: PreTrainedConfig, **sizes: int | None):
        for name, value in sizes.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        super().__init__(config)

    def _start(self, module: nn.Module) -> None:
        """Sets parameters of a layer that do not start as the layer's own class starts them.

        With ``nn.init`` only: its functions spare what a file has filled.
        """

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for every layer that has parameters, and guards what a file has filled.
        if isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
        elif isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding):
            module.reset_parameters()
        self._start(module)


def check_width(name: str, x: Tensor, features: int) -> None:
    """Refuses features of another width.

    Raises:
        ValueError: naming the argument, both widths and the shape.
    """
    if x.dim() < 1 or x.shape[-1] != features:
        raise ValueError(f"{name} must be [..., {features}], got {list(x.shape)}")


def zero(layer: Any) -> None:
    """Lets a layer add nothing at first."""
    nn.init.zeros_(layer.weight)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)


def identity(layer: nn.Linear) -> None:
    """Lets a layer pass on at first what it gets; its two widths are equal."""
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
