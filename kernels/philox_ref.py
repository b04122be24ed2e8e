"""Counter-based noise keyed by (seed, position, token): Philox-4x32-10, uniforms and Gumbel values."""

from __future__ import annotations

import torch
from torch import Tensor

TARGET, COIN, RESIDUAL = range(3)  # NoiseStream of csrc/verify_tree.h

_MASK32 = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * b`` for 32-bit values in int64, which cannot hold the whole product."""
    low_part = a * (b & 0xFFFF)
    high_part = a * (b >> 16) + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10: ten rounds over a 128-bit counter with a 64-bit key.

    Args:
        counter: four int64 tensors holding 32-bit words, any shapes that broadcast.
        key: two int64 tensors holding 32-bit words, likewise.

    Returns:
        Four int64 tensors of random 32-bit words.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        hi0, lo0 = _mul_hi_lo(_MULTIPLIERS[0], c0)
        hi1, lo1 = _mul_hi_lo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def uniform(seed: Tensor, position: Tensor, token: Tensor, stream: int = TARGET) -> Tensor:
    """``u = (x >> 8) * 2**-24`` in [0, 1), float64, where ``x`` is the token's word of the Philox block.

    Four consecutive token ids share one block: ``counter = (token >> 2, position_lo, position_hi, stream)``,
    ``key = (seed_lo, seed_hi)``, and the token takes word ``token & 3``.

    Args:
        seed: int64, any value.
        position: int64, absolute position of the token that is being drawn.
        token: int64 token ids, not negative. The three broadcast.
        stream: ``TARGET``, ``COIN`` or ``RESIDUAL``: noise that does not depend on that of the others.
    """
    counter = (token >> 2, position & _MASK32, (position >> 32) & _MASK32, torch.full_like(token, stream))
    words = philox4x32(counter, (seed & _MASK32, (seed >> 32) & _MASK32))
    lane = (token & 3).expand_as(words[0])
    word = torch.stack(words).gather(0, lane.unsqueeze(0)).squeeze(0)
    return (word >> 8).double() * 2.0**-24


def gumbel(seed: Tensor, position: Tensor, token: Tensor, stream: int = TARGET) -> Tensor:
    """Standard Gumbel noise ``-log(-log(max(u, 2**-25)))``, float64; the floor keeps ``u = 0`` finite."""
    return -torch.log(-torch.log(uniform(seed, position, token, stream).clamp_min(2.0**-25)))
