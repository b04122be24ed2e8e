"""The forward that `specfuse.patch` puts in front of a vision-language model's own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache

from specfuse.hf.cache_names import CACHE_NAMES, cache_argument, pop_cache
from specfuse.models import VisualAdapter
from specfuse.vision.fingerprint import ModelFingerprint
from specfuse.vision.prefix import Bypass, Prefill, RowPrefix, find_prefixes, prefix_key
from specfuse.vision.prefix_kv import PrefixKV, append, gather, on_update, recorder

if TYPE_CHECKING:
    from specfuse.vision.cache import VisionCache

# Arguments of forward that are understood; a call with any other is passed on unchanged.
_CALL_NAMES = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "cache_position",
    *CACHE_NAMES,
    "logits_to_keep",
    "use_cache",
    "return_dict",
}


class CachedForward:
    """Callable that stands in for `model.forward`.

    A prefill with pixels is split at the last visual token of each row: the KV of what lies before comes from
    the cache (or is computed and kept), the original forward runs on the rest. Anything else is the original
    forward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        original: Callable[..., Any],
        adapter: VisualAdapter,
        cache: VisionCache,
        had_own_forward: bool,
    ):
        self.model = model
        self.original = original
        self.adapter = adapter
        self.cache = cache
        self.had_own_forward = had_own_forward
        self.fingerprint = ModelFingerprint(model)
        signature = inspect.signature(original)
        self._names = list(signature.parameters)
        self.cache_argument = cache_argument(original)
        # generate() encodes pixels ahead of forward where forward says that it takes encoded ones; then no
        # clip could be recognised any more. Such arguments still work through **kwargs.
        kept = [p for name, p in signature.parameters.items() if name not in adapter.encoded_names]
        self.__signature__ = signature.replace(parameters=kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedForward:
        model = copy.deepcopy(self.model, memo)
        original = copy.deepcopy(self.original, memo)
        return CachedForward(model, original, self.adapter, self.cache, self.had_own_forward)

    def __reduce__(self) -> Any:
        raise TypeError("a patched model can not be pickled: call specfuse.unpatch(model) first")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        pixels = {
            name: arguments[name] for name in self.adapter.pixel_names if arguments.get(name) is not None
        }
        if not pixels or torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        try:
            call = self._parse(arguments, pixels)
            rows = find_prefixes(call, list(self.adapter.visual_ids(self.model).values()))
            row_pixels = self._split_pixels(call)
        except Bypass as reason:
            self.cache.note_bypass(str(reason))
            return self.original(*args, **kwargs)
        return self._prefill(call, rows, row_pixels)

    # ---------------------------------------------------------------- what is asked

    def _parse(self, arguments: dict[str, Any], pixels: dict[str, Tensor]) -> Prefill:
        given = {name: value for name, value in arguments.items() if value is not None and name not in pixels}
        if unknown := sorted(given.keys() - _CALL_NAMES - self.adapter.option_names):
            raise Bypass(f"argument {unknown[0]}")
        if self.model.training or torch.is_grad_enabled():
            raise Bypass("gradients or training mode")
        config = self.model.config
        if config.output_attentions or config.output_hidden_states:
            raise Bypass("hidden states or attentions wanted")
        if not given.get("return_dict", getattr(config, "return_dict", True)):
            raise Bypass("tuple output")
        if reason := self.adapter.position_dependent(self.model):
            raise Bypass(reason)
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise Bypass("no input_ids")
        return Prefill(
            input_ids=ids,
            pixels=pixels,
            attention_mask=given.get("attention_mask"),
            position_ids=self._checked_positions(given.get("position_ids"), ids),
            cache_position=given.get("cache_position"),
            logits_to_keep=self._checked_keep(given.get("logits_to_keep", 0)),
            past=self._checked_cache(given),
            options={name: given[name] for name in self.adapter.option_names & given.keys()},
        )

    @staticmethod
    def _checked_positions(positions: Tensor | None, ids: Tensor) -> Tensor | None:
        if positions is not None and (
            positions.ndim != 2
            or positions.shape[1] != ids.shape[1]
            or positions.shape[0] not in (1, ids.shape[0])
        ):
            raise Bypass(f"position ids of shape {tuple(positions.shape)}")
        return positions

    @staticmethod
    def _checked_keep(keep: Any) -> int | Tensor:
        if isinstance(keep, Tensor) and keep.ndim == 1 and keep.dtype == torch.int64 and keep.numel():
            return keep
        if isinstance(keep, int) and keep > 0:
            return keep
        raise Bypass("logits wanted for the whole prompt")

    def _checked_cache(self, given: dict[str, Any]) -> Any:
        past = pop_cache(dict(given))
        if not given.get("use_cache", self.model.config.get_text_config().use_cache):
            raise Bypass("use_cache=False")
        if past is None:
            return DynamicCache(config=self.model.config.get_text_config())
        # The first pass over a quantized cache still attends to exact keys, later ones do not.
        if not isinstance(past, Cache) or isinstance(past, QuantizedCache):
            raise Bypass(f"cache of class {type(past).__name__}")
        if int(past.get_seq_length()) > 0:
            raise Bypass("cache already filled")
        return past

    def _split_pixels(self, call: Prefill) -> list[dict[str, Tensor]]:
        try:
            return self.adapter.split_pixels(self.model, call.input_ids, call.pixels)
        except ValueError as error:  # the original forward reports it better
            raise Bypass("pixels do not match placeholders") from error

    # ---------------------------------------------------------------- serving it

    def _prefill(self, call: Prefill, rows: list[RowPrefix], row_pixels: list[dict[str, Tensor]]) -> Any:
        keys = self._keys(call, rows, row_pixels)
        found: dict[bytes, PrefixKV | None] = {}
        for key in keys:
            if key in found:
                self.cache.note_shared()
            elif key is not None:
                found[key] = self.cache.get(key)
        if all(entry is None for entry in found.values()) and len(found) == sum(
            key is not None for key in keys
        ):
            return self._compute_all(call, rows, keys)
        for row, key in enumerate(keys):
            if key is not None and found[key] is None:
                found[key] = self._compute_prefix(call, rows[row], row, row_pixels[row])
                self.cache.put(key, found[key])  # type: ignore[arg-type]
        return self._resume(call, rows, [found[key] if key is not None else None for key in keys])

    def _keys(
        self, call: Prefill, rows: list[RowPrefix], row_pixels: list[dict[str, Tensor]]
    ) -> list[bytes | None]:
        kind = call.input_ids.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        text, model = self.model.config.get_text_config(), self.model
        parts = (model.dtype, text._attn_implementation, autocast, sorted(call.options.items()))
        state = f"{self.fingerprint.digest().hex()} {parts} {call.input_ids.device}"
        return [
            prefix_key(
                state,
                call.input_ids[i, row.first : row.end],
                row.start_position,
                pixels,
                self.adapter.pixel_names,
            )
            if row.length
            else None
            for i, (row, pixels) in enumerate(zip(rows, row_pixels, strict=True))
        ]

    def _compute_all(self, call: Prefill, rows: list[RowPrefix], keys: list[bytes | None]) -> Any:
        """The original forward on everything; the prefixes are kept on the way."""
        kept, keep = recorder([(row.first, row.end) for row in rows])
        with on_update(call.past, keep):
            output = self._run(call, call.pixels)
        for key, layers in zip(keys, kept, strict=True):
            if key is not None:
                self.cache.put(key, PrefixKV(layers))
        return output

    def _compute_prefix(
        self, call: Prefill, prefix: RowPrefix, row: int, pixels: dict[str, Tensor]
    ) -> PrefixKV:
        """KV of one row's prefix, computed by itself."""
        ids = call.input_ids[row : row + 1, prefix.first : prefix.end]
        positions = torch.arange(prefix.length, device=ids.device)[None] + prefix.start_position
        past = DynamicCache(config=self.model.config.get_text_config())
        kept, keep = recorder([(0, prefix.length)])
        with on_update(past, keep):
            self._run(Prefill(ids, pixels, None, positions, None, 1, past, call.options), pixels)
        return PrefixKV(kept[0])

    def _resume(self, call: Prefill, rows: list[RowPrefix], entries: list[PrefixKV | None]) -> Any:
        """Puts the known prefixes into the cache and runs the original forward on the slots behind the
        shortest.

        A row whose prefix is longer than that is forwarded with placeholder tokens in the slots in between;
        their keys and values are replaced by the known ones before anything attends to them, their logits are
        not kept.
        """
        begin = min(row.end for row in rows)
        layers = [None if entry is None else entry.acquire() for entry in entries]
        known = next(row for row in layers if row is not None)
        if begin:
            for layer in known:
                keys, values = (gather(layers, rows, layer, which, begin) for which in (0, 1))
                append(call.past, layer, keys, values)

        def splice(k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
            k, v = k.clone(), v.clone()
            for i, (row, entry) in enumerate(zip(rows, layers, strict=True)):
                if entry is not None and row.end > begin:
                    skipped = max(begin - row.first, 0)
                    part = slice(max(row.first - begin, 0), row.end - begin)
                    k[i, :, part], v[i, :, part] = (t[0, :, skipped:] for t in entry[layer])
            return k, v

        ragged = any(row.end > begin for row, entry in zip(rows, layers, strict=True) if entry is not None)
        rest = _behind(call, begin)
        if not ragged:
            return self._run(rest, {})
        with on_update(call.past, splice):
            return self._run(rest, {})

    def _run(self, call: Prefill, pixels: dict[str, Tensor]) -> Any:
        optional = {"cache_position": call.cache_position} if call.cache_position is not None else {}
        return self.original(
            input_ids=call.input_ids,
            attention_mask=call.attention_mask,
            position_ids=call.position_ids,
            **{self.cache_argument: call.past},
            logits_to_keep=call.logits_to_keep,
            use_cache=True,
            return_dict=True,
            **optional,
            **pixels,
            **call.options,
        )


def _behind(call: Prefill, begin: int) -> Prefill:
    """The same call for the slots from `begin` on, the ones before being in the cache already."""
    mask, keep = call.attention_mask, call.logits_to_keep
    if isinstance(keep, Tensor):
        keep = torch.where(keep < 0, keep, keep - begin)
    return replace(
        call,
        input_ids=call.input_ids[:, begin:],
        attention_mask=mask[:, :, begin:] if mask is not None and mask.ndim == 4 else mask,
        position_ids=None if call.position_ids is None else call.position_ids[:, begin:],
        cache_position=None if call.cache_position is None else call.cache_position[begin:],
        logits_to_keep=keep,
    )
