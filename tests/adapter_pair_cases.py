"""Small pairs that every kind of adapter learns from."""

from __future__ import annotations

import torch

from specfuse.train.adapter_pairs import Pairs

N, W, D, V = 200, 10, 12, 20


def vectors(seed: int = 0, **changes) -> Pairs:
    """Targets are a linear function of sources beside a large mean; two samples for each clip."""
    g = torch.Generator().manual_seed(seed)
    source = torch.randn(N, W, generator=g)
    target = source @ torch.randn(W, D, generator=g) + 4 * torch.randn(D, generator=g)
    clips = torch.arange(N) // 2
    arrays = {"source": source, "target": target, "clips": clips, "held_out": clips % 5 == 4}
    return Pairs(**{**arrays, **changes})


def tokens() -> Pairs:
    """Noise beside a mean that can be learned."""
    g = torch.Generator().manual_seed(1)
    source = torch.randn(N, 4, W, generator=g)
    target = torch.randn(N, 4, D, generator=g) + 2 * torch.randn(D, generator=g)
    clips = torch.arange(N)
    return Pairs(source, target, clips, clips % 5 == 4, context=torch.randn(N, 3, 6, generator=g))


def expanded() -> Pairs:
    found = tokens()
    return Pairs(found.source, found.target.repeat_interleave(4, 1), found.clips, found.held_out)


def decoded(same: bool = False) -> Pairs:
    """Last hidden states with heads; with ``same`` the drafter is the target."""
    g = torch.Generator().manual_seed(4)
    found = vectors(target=torch.randn(N, W, generator=g) / 2 + 2 * torch.randn(W, generator=g))
    head = torch.randn(V, W, generator=torch.Generator().manual_seed(3))
    target = found.source if same else found.target
    return Pairs(found.source, target, found.clips, found.held_out, source_head=head, target_head=head)


def texts() -> Pairs:
    """The next 3 tokens are the last one, and the ones after it; states do not matter."""
    last = torch.arange(N) % V
    following = (last[:, None] + torch.arange(1, 4)) % V
    clips = torch.arange(N)
    return Pairs(
        torch.randn(5, 2, W),
        following,
        clips,
        clips % 3 == 2,
        context=last[:, None].repeat(1, 2),
        rows=clips % 5,
        source_head=torch.zeros(V, W),
    )


PAIRS = {
    "linear": vectors,
    "residual-mlp": vectors,
    "lightweight": vectors,
    "cross-attention": tokens,
    "expander": expanded,
    "token-alignment": decoded,
    "compression": texts,
}
