"""The noise: Philox known answers, and the same bits in Python, C++ and the plain-integer oracle."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from verify_tree_cases import MASK32, gumbel_oracle, philox_oracle, word_oracle

from specfuse.kernels.philox_ref import gumbel, philox4x32, uniform
from specfuse.ops import native

# kat_vectors of Random123, philox4x32 with 10 rounds: counter, key, answer.
KNOWN = [
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([MASK32] * 4, (MASK32, MASK32), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
# Seeds and positions whose 32-bit halves all matter, negative ones included.
KEYS = [(0, 0), (1, 1), (-1, 5), (2**63 - 1, 2**32), (-(2**63), 2**32 + 7), (0x123456789ABCDEF, 2**62 + 3)]
TOKENS = [0, 1, 2, 3, 4, 63, 64, 31999, 32000, 262143]

needs_native = pytest.mark.skipif(native.cpu is None, reason="the C++ module is not built")


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(counter: list[int], key: tuple[int, int], answer: list[int]) -> None:
    words = philox4x32(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert [int(w) for w in words] == answer
    assert philox_oracle(counter, key) == answer


@pytest.mark.parametrize(("seed", "position"), KEYS)
def test_uniform_is_the_oracles(seed: int, position: int) -> None:
    u = uniform(torch.tensor(seed), torch.tensor(position), torch.tensor(TOKENS))
    assert u.dtype == torch.float64
    assert u.tolist() == [(word_oracle(seed, position, t) >> 8) * 2.0**-24 for t in TOKENS]


@needs_native
@pytest.mark.parametrize(("seed", "position"), KEYS)
def test_native_words_are_the_oracles(seed: int, position: int) -> None:
    assert [native.cpu.noise_word(seed, position, t) for t in TOKENS] == [
        word_oracle(seed, position, t) for t in TOKENS
    ]


@needs_native
@pytest.mark.parametrize(("seed", "position"), KEYS)
def test_native_blocks_are_its_words(seed: int, position: int) -> None:
    """The vectorised noise of the C++ row pass, on both instruction sets, over 3 steps of 64 tokens."""
    expected = [word_oracle(seed, position, t) for t in range(192)]
    for portable in (False, True):
        assert native.cpu.noise_words(seed, position, 192, portable) == expected


def test_gumbel_follows_its_formula_and_is_finite() -> None:
    tokens = torch.arange(500)
    values = gumbel(torch.tensor(3), torch.tensor(9), tokens)
    expected = torch.tensor([gumbel_oracle(3, 9, t) for t in tokens.tolist()], dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-14, atol=1e-14)
    assert -math.log(-math.log(2.0**-25)) > -3  # what u = 0 becomes: far from -inf


@pytest.mark.parametrize("varying", ["token", "position", "seed"])
def test_noise_is_gumbel_along_each_key(varying: str) -> None:
    """Kolmogorov-Smirnov along each key; neighbouring keys are uncorrelated."""
    keys = {name: torch.tensor(7) for name in ("seed", "position", "token")}
    keys[varying] = torch.arange(20000)
    values = gumbel(**{k: v.expand(20000) for k, v in keys.items()}).numpy()
    assert stats.kstest(values, "gumbel_r").pvalue > 1e-3
    assert abs(stats.pearsonr(values[:-1], values[1:]).statistic) < 0.03


def test_the_distribution_test_rejects_uniform_noise() -> None:
    """Negative control of the test above."""
    u = uniform(torch.tensor(7), torch.tensor(7), torch.arange(20000)).numpy()
    assert stats.kstest(u, "gumbel_r").pvalue < 1e-10
