"""Device functions of the noise in Triton: the words of ``csrc/verify_tree.h``, bit for bit.

Operations: a Philox block is 20 wide multiplications and about 60 other integer instructions, shared by four
consecutive tokens; a Gumbel value adds two logarithms. 64 rows of 32,000 tokens are 0.5 million blocks, below
2 us of an H200's integer rate (an estimate, not a measurement).

Limits: token ids below 2**34, as the block id is one 32-bit word; logarithms are float32, so that a value can
differ from the float64 reference by about 1e-6.
"""

# Triton annotates only its constants.
# mypy: allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10 on uint32 tensors whose shapes broadcast; returns the four random words."""
    for _ in tl.static_range(10):
        # One 64-bit product holds both halves, which the hardware computes in one instruction.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def noise_words(seed, position, block):
    """The words of tokens ``4 * block .. 4 * block + 3``; int64 seed and position, any integer block."""
    zero = tl.zeros_like(block).to(tl.uint32)
    return philox4x32(
        block.to(tl.uint32),
        position.to(tl.uint32),
        (position >> 32).to(tl.uint32),
        zero,
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )


@triton.jit
def noise_tile(seed, position, first_block, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """Words [ROWS, TOKENS] of the tokens from ``4 * first_block`` on; seed and position are [ROWS] int64."""
    block = first_block + tl.arange(0, TOKENS // 4)
    w0, w1, w2, w3 = noise_words(seed[:, None], position[:, None], block[None, :])
    # The last join is the fastest dimension: (w0, w1), (w2, w3) in the order of the tokens.
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(ROWS, TOKENS)


@triton.jit
def gumbel(word):
    """Standard Gumbel noise of a word: ``-log(-log(u))``, ``u = (word >> 8) * 2**-24``, at least 2**-25."""
    u = (word >> 8).to(tl.float32) * 5.9604644775390625e-08
    return -tl.log(-tl.log(tl.maximum(u, 2.98023223876953125e-08)))
