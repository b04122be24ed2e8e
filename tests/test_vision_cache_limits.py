"""The vision cache is bounded in bytes, drops the least recently used, and is safe from threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny_models import tiny_video_llava, tokens_per_frame, video_inputs
from torch import Tensor

from specfuse.vision.cache import VisionCache, patched


def answer(model: Any, inputs: dict[str, Tensor], tokens: int = 10) -> Tensor:
    """Greedy answer of `model.generate`, [B, S + tokens]."""
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False)


def entry_bytes(model: Any) -> int:
    with patched(model) as cache:
        answer(model, video_inputs(model), tokens=1)
    return cache.nbytes


def test_bytes_are_those_of_the_prefix() -> None:
    model = tiny_video_llava()
    tokens = 4 + 4 * tokens_per_frame(model)
    with patched(model) as cache:
        answer(model, video_inputs(model), tokens=1)
    assert cache.nbytes == 2 * 2 * 2 * 16 * 4 * tokens  # layers, k and v, heads, dim, bytes
    (entry,) = cache._entries.values()
    held = [t.untyped_storage().nbytes() for pair in entry.layers.values() for t in pair]
    assert sum(held) == cache.nbytes  # nothing larger is kept alive behind a view


def test_byte_bound_and_least_recently_used_order() -> None:
    model = tiny_video_llava(eos=False)
    size = entry_bytes(model)
    cache = VisionCache(max_bytes=2 * size + size // 2)

    def ask(clip: int) -> str:
        before = cache.stats.hits
        answer(model, video_inputs(model, clips=[clip]), tokens=1)
        assert cache.nbytes <= cache.max_bytes and cache.nbytes == len(cache) * size
        return "hit" if cache.stats.hits > before else "miss"

    with patched(model, cache):
        outcomes = [ask(clip) for clip in (0, 1, 0, 2, 0, 1)]  # 2 evicts 1, not 0
    assert outcomes == ["miss", "miss", "hit", "miss", "hit", "miss"]
    assert cache.stats.evictions == 2
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_an_entry_above_the_bound_is_not_stored() -> None:
    model = tiny_video_llava(eos=False)
    inputs = video_inputs(model, 3, clips=[0, 1, 0])
    expected = answer(model, inputs)
    for max_bytes in (0, entry_bytes(model) - 1, entry_bytes(model)):  # the last: one row evicts another
        cache = VisionCache(max_bytes=max_bytes)
        with patched(model, cache):
            for _ in range(2):
                assert torch.equal(answer(model, inputs), expected)
        assert cache.nbytes <= max_bytes


@pytest.mark.parametrize("bad", [-1, 1.5, "4GiB", True, None])
def test_max_bytes_is_checked(bad: Any) -> None:
    with pytest.raises(ValueError, match=f"max_bytes.*{bad}"):
        VisionCache(max_bytes=bad)


@pytest.mark.parametrize("entries", [1, 8])
def test_threads_share_a_cache(entries: int) -> None:
    """Four threads, three clips, several questions; with room for one entry, entries in use are evicted."""
    model = tiny_video_llava(eos=False)
    requests = [video_inputs(model, clips=[i % 3], question_seed=i) for i in range(12)]
    expected = [answer(model, request, tokens=4) for request in requests]
    wrong: list[int] = []
    cache = VisionCache(max_bytes=entries * entry_bytes(model))

    def work(offset: int) -> None:
        for i in range(offset, offset + 12):
            got = answer(model, requests[i % 12], tokens=4)
            if not torch.equal(got, expected[i % 12]):
                wrong.append(i % 12)

    with patched(model, cache):
        threads = [threading.Thread(target=work, args=(3 * t,)) for t in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert cache.stats.hits + cache.stats.misses == 48
    assert cache.nbytes <= cache.max_bytes


@pytest.mark.gpu
def test_threads_on_their_own_cuda_streams() -> None:
    """An entry written on one stream is complete when another stream reads it."""
    model = tiny_video_llava(eos=False).cuda()
    requests = [{k: v.cuda() for k, v in video_inputs(model, clips=[i % 2]).items()} for i in range(8)]
    expected = [answer(model, request) for request in requests]
    wrong: list[int] = []

    def work(offset: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(offset, offset + 8):
                if not torch.equal(answer(model, requests[i % 8]), expected[i % 8]):
                    wrong.append(i % 8)

    with patched(model, VisionCache(max_bytes=entry_bytes(model))):
        threads = [threading.Thread(target=work, args=(t,)) for t in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
