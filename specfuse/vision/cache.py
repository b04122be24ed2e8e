"""The video is encoded once: KV of prompts up to their last image or video token, kept by content.

cache = specfuse.patch(model)                 # model.generate and specfuse.generate profit alike
model.generate(**inputs)                      # encodes the clip
model.generate(**another_question)            # forwards the question only
specfuse.unpatch(model)                       # the original object again
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from specfuse.models import adapter_for
from specfuse.vision.forward import CachedForward
from specfuse.vision.prefix_kv import PrefixKV

DEFAULT_MAX_BYTES = 4 * 2**30


@dataclass(frozen=True)
class VisionCacheStats:
    """What a `VisionCache` did so far.

    Attributes:
        hits: prompt rows whose visual prefix was reused.
        misses: prompt rows whose visual prefix was computed.
        bypassed: forward calls with pixels that were passed on unchanged.
        bypass_reasons: why, with counts.
        evictions: entries dropped to stay within `max_bytes`.
        bytes: memory of the entries now held.
        entries: entries now held.
    """

    hits: int
    misses: int
    bypassed: int
    evictions: int
    bytes: int
    entries: int
    bypass_reasons: dict[str, int] = field(default_factory=dict)


class VisionCache:
    """KV of visual prefixes by content key; bounded in bytes, least recently used out first.

    One cache may serve several models and several threads. It holds device memory until entries are evicted
    or `clear` is called.

    Args:
        max_bytes: bound on the bytes of all entries (default 4 GiB; Video-LLaVA-7B in fp16 takes about 1 GiB
            a clip). An entry larger than this is never stored.

    Raises:
        ValueError: `max_bytes` is not a non-negative integer.
    """

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES):
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ValueError(f"max_bytes must be a non-negative integer, got {max_bytes!r}")
        self.max_bytes = max_bytes
        self._entries: OrderedDict[bytes, PrefixKV] = OrderedDict()
        self._lock = threading.RLock()
        self._hits = self._misses = self._evictions = 0
        self._bypassed: Counter[str] = Counter()

    def get(self, key: bytes) -> PrefixKV | None:
        """The entry of `key`, now the most recently used one, or None; counts a hit or a miss."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return entry

    def put(self, key: bytes, entry: PrefixKV) -> bool:
        """Stores an entry, evicting the least recently used ones; False if it alone exceeds `max_bytes`."""
        with self._lock:
            if entry.nbytes > self.max_bytes:
                return False
            self._entries.pop(key, None)
            while self.nbytes + entry.nbytes > self.max_bytes:
                self._entries.popitem(last=False)
                self._evictions += 1
            self._entries[key] = entry
            return True

    def clear(self) -> None:
        """Forgets all entries; the counters stay."""
        with self._lock:
            self._entries.clear()

    def note_shared(self) -> None:
        """Counts a hit on a prefix that an earlier row of the same batch brought in."""
        with self._lock:
            self._hits += 1

    def note_bypass(self, reason: str) -> None:
        """Counts a call that was passed on unchanged."""
        with self._lock:
            self._bypassed[reason] += 1

    @property
    def stats(self) -> VisionCacheStats:
        """Counters and sizes at this moment."""
        with self._lock:
            return VisionCacheStats(
                hits=self._hits,
                misses=self._misses,
                bypassed=self._bypassed.total(),
                evictions=self._evictions,
                bytes=self.nbytes,
                entries=len(self._entries),
                bypass_reasons=dict(self._bypassed),
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        # Counted anew: a running total would be wrong for good after a Ctrl-C between two lines.
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __bool__(self) -> bool:  # an empty cache is still a cache
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> VisionCache:
        # A deep copy of a patched model shares the cache: entries are keyed by model.
        return self

    def __repr__(self) -> str:
        return f"VisionCache(entries={len(self)}, bytes={self.nbytes}, max_bytes={self.max_bytes})"


def patch(model: PreTrainedModel, cache: VisionCache | None = None) -> VisionCache:
    """Makes `model.forward` reuse the KV of visual prefixes it has already computed.

    Only prefill calls without gradients that keep logits behind the last visual token are served (what
    `generate` does); every other call goes to the original forward unchanged.

    Answers stay the same. Logits may differ in their last bits from an uncached run, because the question
    alone is a smaller matrix product than prompt and question together; in half precision a near-tie between
    two tokens may therefore fall the other way, as it may between two batch sizes. A reused prefix returns no
    `image_hidden_states` / `video_hidden_states`.

    Args:
        model: a `VideoLlavaForConditionalGeneration`. Patching a patched model replaces its cache.
        cache: shared between models and threads if you like; default: a new one of 4 GiB.

    Returns:
        The cache in use.

    Raises:
        ValueError: a model class that is not supported, or a cache of another type.
    """
    adapter = adapter_for(model)
    if cache is None:
        cache = VisionCache()
    if not isinstance(cache, VisionCache):
        raise ValueError(f"cache must be a VisionCache, got {type(cache).__name__}")
    unpatch(model)
    # Something else (accelerate's device hooks) may have put a forward on the instance already: it comes back
    # later.
    had_own_forward = "forward" in vars(model)
    cached: Any = CachedForward(model, model.forward, adapter, cache, had_own_forward)
    model.forward = cached
    return cache


def unpatch(model: PreTrainedModel) -> None:
    """Restores the forward that `patch` replaced, leaving no attribute behind; does nothing on an unpatched
    model.

    Raises:
        ValueError: somebody wrapped the patched forward since; undo that first.
    """
    current = vars(model).get("forward")
    if isinstance(current, CachedForward):
        del model.forward
        if current.had_own_forward:
            model.forward = current.original
    elif isinstance(getattr(current, "__wrapped__", None), CachedForward):
        raise ValueError(f"model: {current!r} wraps the patched forward, remove it before unpatch")


@contextmanager
def patched(model: PreTrainedModel, cache: VisionCache | None = None) -> Iterator[VisionCache]:
    """Patches for the length of a `with` block, which receives the cache."""
    try:
        yield patch(model, cache)
    finally:
        unpatch(model)
