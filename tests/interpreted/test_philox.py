"""The noise in Triton: the same words as Python and C++, and Gumbel values within float32 rounding."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from specfuse.kernels.philox import gumbel, noise_tile, philox4x32
from specfuse.kernels.philox_ref import gumbel as gumbel_ref
from specfuse.kernels.philox_ref import philox4x32 as philox_ref
from specfuse.kernels.philox_ref import uniform

# Seeds and positions whose 32-bit halves all matter, negative ones included.
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF, -7, 2**32]
POSITIONS = [0, 1, 5, 2**32, 2**32 + 7, 2**62 + 3, 2**31, 2**63 - 1]


@triton.jit
def words_kernel(counter, key, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    w = philox4x32(
        tl.load(counter + i),
        tl.load(counter + COUNT + i),
        tl.load(counter + 2 * COUNT + i),
        tl.load(counter + 3 * COUNT + i),
        tl.load(key + i),
        tl.load(key + COUNT + i),
    )
    for j in tl.static_range(4):
        tl.store(out + j * COUNT + i, w[j])


@triton.jit
def tile_kernel(seed, position, words, values, first_block, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    rows, tokens = tl.arange(0, ROWS), tl.arange(0, TOKENS)
    word = noise_tile(tl.load(seed + rows), tl.load(position + rows), first_block, ROWS, TOKENS)
    at = rows[:, None] * TOKENS + tokens[None, :]
    tl.store(words + at, word)
    tl.store(values + at, gumbel(word))


def tile(first: int, tokens: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    seed, position = torch.tensor(SEEDS), torch.tensor(POSITIONS)
    words = torch.full((len(SEEDS), tokens), -1, dtype=torch.int32)
    values = torch.full((len(SEEDS), tokens), torch.nan)
    tile_kernel[(1,)](seed, position, words, values, first // 4, len(SEEDS), tokens)
    ids = torch.arange(first, first + tokens)
    return words, values, (seed[:, None], position[:, None], ids[None, :].expand(len(SEEDS), tokens))


def test_words_of_any_counter_and_key() -> None:
    generator = torch.Generator().manual_seed(0)
    counter = torch.randint(0, 2**32, (4, 16), generator=generator)
    key = torch.randint(0, 2**32, (2, 16), generator=generator)
    counter[:, 0], key[:, 0] = 2**32 - 1, 2**32 - 1
    out = torch.zeros(4, 16, dtype=torch.int32)
    words_kernel[(1,)](counter.to(torch.uint32), key.to(torch.uint32), out, 16)
    expected = torch.stack(philox_ref(tuple(counter), tuple(key)))
    assert torch.equal(out.long() & 0xFFFFFFFF, expected)
    assert expected[:, 0].tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]  # Random123


@pytest.mark.parametrize("first", [0, 31_936, 262_080, 2**31, 2**33])
def test_tile_holds_the_words_of_its_tokens_in_order(first: int) -> None:
    words, _, keys = tile(first, 64)
    # uniform() keeps the upper 24 bits; the lowest 8 are those of the block, tested above.
    assert torch.equal((words.long() & 0xFFFFFFFF) >> 8, (uniform(*keys) * 2**24).long())


def test_gumbel_is_the_reference_within_float32_rounding() -> None:
    _, values, keys = tile(0, 1024)
    torch.testing.assert_close(values.double(), gumbel_ref(*keys), rtol=1e-6, atol=1e-6)


@triton.jit
def gumbel_kernel(word, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, gumbel(tl.load(word + i).to(tl.uint32, bitcast=True)))


def test_gumbel_at_both_ends_is_finite_and_exact_enough() -> None:
    """u = 0 takes the floor 2^-25; u = 1 - 2^-24 is the largest value, 16.6."""
    word = torch.tensor(
        [0, 255, 256, 0xFFFFFF00 - 2**32, -1, 2**31 - 1, -(2**31), 1 << 20], dtype=torch.int32
    )
    out = torch.full((8,), torch.nan)
    gumbel_kernel[(1,)](word, out, 8)
    u = ((word.long() & 0xFFFFFFFF) >> 8).double() * 2.0**-24
    expected = -torch.log(-torch.log(u.clamp_min(2.0**-25)))
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    assert abs(float(out[4]) - 16.6355) < 1e-3
