"""How adapters are made for pairs, run on them, and what they are trained for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specfuse.adapters import (
    KINDS,
    AdapterModel,
    CompressionDrafterConfig,
    CrossAttentionAlignerConfig,
    LightweightAdapterConfig,
    LinearAdapterConfig,
    ResidualMLPAdapterConfig,
    TokenAlignmentAdapterConfig,
    TokenExpanderConfig,
    kind_of,
)
from specfuse.train.adapter_pairs import Pairs, fit_width

LOSSES = ("feature", "contrastive", "kl", "tokens")
COSINE_WEIGHT = 0.5
CONTRASTIVE_WEIGHT = 0.1
TEMPERATURE = 0.07  # of InfoNCE, as in CLIP
SMALL_WIDTH = 64  # of a compression drafter's decoder for each head


def build_adapter(kind: str, pairs: Pairs, seed: int) -> AdapterModel:
    """An untrained adapter of a kind for these pairs.

    Raises:
        ValueError: another kind, or pairs that it cannot learn from; names what is missing.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KINDS[kind](_config(kind, pairs))


def _config(kind: str, pairs: Pairs) -> Any:
    source, target = pairs.source.shape, pairs.target.shape
    width = target[-1]
    tokens = not pairs.target.is_floating_point()
    if tokens != (kind == "compression"):
        wanted = "tokens [N, K] int64" if kind == "compression" else "features"
        raise ValueError(f"kind {kind!r} needs pairs whose target are {wanted}, got {pairs.target.dtype}")
    if kind == "compression":
        if pairs.context is None or pairs.source_head is None:
            raise ValueError("kind 'compression' needs pairs with context (text so far) and source_head")
        return CompressionDrafterConfig(
            features=source[-1],
            vocab_size=len(pairs.source_head),
            width=SMALL_WIDTH * 2,
            heads=2,
            horizon=width,
            context=pairs.context.shape[1],
        )
    if kind == "expander":
        if len(source) != 3 or target[1] % source[1]:
            raise ValueError(
                f"kind 'expander' needs tokens, a multiple of {list(source)}, got {list(target)}"
            )
        return TokenExpanderConfig(
            in_features=source[-1],
            features=width,
            width=4 * width,
            factor=target[1] // source[1],
            places=source[1],
        )
    if source[1:-1] != target[1:-1]:
        raise ValueError(
            f"kind {kind!r} needs one target for each source, got {list(source)}, {list(target)}"
        )
    if kind == "token-alignment":
        sides = ((pairs.source_head, source), (pairs.target_head, target))
        sizes = [shape[-1] if head is None else len(head) for head, shape in sides]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"kind 'token-alignment' needs one vocabulary, got {sizes[0]} and {sizes[1]} tokens"
            )
        return TokenAlignmentAdapterConfig(vocab_size=sizes[0], rank=min(64, sizes[0]))
    if kind == "linear":
        return LinearAdapterConfig(in_features=source[-1], features=width)
    if kind == "residual-mlp":
        return ResidualMLPAdapterConfig(features=width)
    if kind == "lightweight":
        return LightweightAdapterConfig(features=width)
    if pairs.context is None or pairs.context.dim() != 3 or len(source) != 3:
        raise ValueError("kind 'cross-attention' needs pairs of tokens with a context [N, M, C]")
    heads = next(h for h in (32, 16, 8, 4, 2, 1) if width % h == 0 and width // h >= min(32, width))
    return CrossAttentionAlignerConfig(
        features=width,
        context_features=pairs.context.shape[-1],
        heads=heads,
        places=source[1],
        context_places=pairs.context.shape[1],
    )


def run_adapter(adapter: AdapterModel, pairs: Pairs, samples: Tensor) -> Tensor:
    """What the adapter makes of some samples, on its own device.

    Kinds with a residual get sources of the target's width, see ``fit_width``. The token-alignment adapter
    returns logits.
    """
    kind, device = kind_of(adapter), adapter.device
    source = pairs.sources(samples).to(device)
    if kind == "compression":
        return adapter(source, _context(pairs, samples).to(device))
    if kind == "token-alignment":
        return adapter(logits_of(source, pairs.source_head))
    if kind in ("linear", "expander"):
        return adapter(source)
    source = fit_width(source, pairs.target.shape[-1])
    if kind == "cross-attention":
        return adapter(source, _context(pairs, samples).float().to(device))
    return adapter(source)


def target_of(adapter: AdapterModel, pairs: Pairs, samples: Tensor) -> Tensor:
    """What ``run_adapter`` is compared with: features, logits or tokens of the target."""
    target = pairs.target[samples].to(adapter.device)
    if not target.is_floating_point():
        return target
    return (
        logits_of(target.float(), pairs.target_head)
        if kind_of(adapter) == "token-alignment"
        else target.float()
    )


def _context(pairs: Pairs, samples: Tensor) -> Tensor:
    assert pairs.context is not None  # build_adapter has seen to it
    return pairs.context[samples]


def logits_of(states: Tensor, head: Tensor | None) -> Tensor:
    """``states [..., D]`` times ``head [V, D]``; what is given where there is no head."""
    return states if head is None else states @ head.float().to(states.device).T


def make_loss(name: str, adapter: AdapterModel, pairs: Pairs) -> Callable[[Tensor], Tensor]:
    """The loss of some samples.

    With y what the adapter makes, t the target, s the mean square of the training targets::

        feature       mean((y - t)^2) / s + 0.5 (1 - mean(cos(y, t)))
        contrastive   feature + 0.1 InfoNCE, over the clips of a batch, of y and t less the mean target
        kl            KL(softmax(H t) || softmax(H y)), H the target's head; of logits without H
        tokens        cross-entropy of the tokens that follow

    Args:
        name: one of ``LOSSES``; token alignment learns by "kl" and the compression drafter by "tokens" only.
        adapter: to train.
        pairs: whose training part is measured.

    Raises:
        ValueError: another name, or a loss that does not go with this kind of adapter or these pairs.

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018, eq. 4;
    Zhou et al., "DistillSpec", 2023, section 3 for the divergence.
    """
    kind = kind_of(adapter)
    only = {"token-alignment": "kl", "compression": "tokens"}
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}")
    if only.get(kind, name) != name or (name == "tokens" and kind != "compression"):
        raise ValueError(f"loss {name!r} does not go with kind {kind!r}")
    if name == "tokens":
        return lambda samples: F.cross_entropy(
            run_adapter(adapter, pairs, samples).flatten(0, 1), target_of(adapter, pairs, samples).flatten()
        )
    if name == "kl":
        head = None if kind == "token-alignment" else pairs.target_head
        if head is None and kind != "token-alignment":
            raise ValueError("loss 'kl' needs pairs with a target_head, whose target are last hidden states")

        def divergence(samples: Tensor) -> Tensor:
            said = logits_of(run_adapter(adapter, pairs, samples), head).log_softmax(-1)
            wanted = logits_of(target_of(adapter, pairs, samples), head).log_softmax(-1)
            return F.kl_div(said, wanted, reduction="none", log_target=True).sum(-1).mean()

        return divergence
    trained = pairs.target[pairs.part("train")].float()
    scale = float(trained.square().mean().clamp(min=1e-12))
    mean = trained.flatten(0, -2).mean(0).to(adapter.device)

    def features(samples: Tensor) -> Tensor:
        y, t = run_adapter(adapter, pairs, samples), target_of(adapter, pairs, samples)
        loss = feature_loss(y, t, scale)
        if name == "contrastive":
            loss = loss + CONTRASTIVE_WEIGHT * info_nce(_pooled(y) - mean, _pooled(t) - mean)
        return loss

    return features


def feature_loss(y: Tensor, target: Tensor, scale: float) -> Tensor:
    """``mean((y - t)^2) / scale + 0.5 (1 - mean(cos(y, t)))`` for ``[..., D]``."""
    cosine = F.cosine_similarity(y, target, dim=-1).mean()
    return F.mse_loss(y, target) / scale + COSINE_WEIGHT * (1 - cosine)


def info_nce(y: Tensor, target: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """How hard it is to tell which target belongs to which row, both ways, ``[M, D]`` each::

    c[i, j] = cos(y_i, t_j) / temperature
    loss = -mean_i(log softmax_j(c)[i, i] + log softmax_i(c)[i, i]) / 2
    """
    scores = F.normalize(y, dim=-1) @ F.normalize(target, dim=-1).T / temperature
    own = torch.arange(len(y), device=y.device)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def _pooled(tokens: Tensor) -> Tensor:
    return tokens.mean(1) if tokens.dim() == 3 else tokens


@torch.no_grad()
def validation_score(adapter: AdapterModel, loss: str, pairs: Pairs, samples: Tensor) -> float:
    """What early stopping follows, higher is better.

    The mean cosine; under "kl" the chance that a token drawn from what the adapter says is accepted,
    ``sum_v min(p_v, q_v)``; under "tokens" the share of right tokens.
    """
    total = 0.0
    for part in samples.split(256):
        y, t = run_adapter(adapter, pairs, part), target_of(adapter, pairs, part)
        if loss == "tokens":
            values = (y.argmax(-1) == t).float()
        elif loss == "kl":
            head = None if kind_of(adapter) == "token-alignment" else pairs.target_head
            values = torch.minimum(logits_of(y, head).softmax(-1), logits_of(t, head).softmax(-1)).sum(-1)
        else:
            values = F.cosine_similarity(y, t, dim=-1)
        total += float(values.mean()) * len(part)
    return total / len(samples)
