"""Sizes of the adapters, in Hugging Face's form: ``save_pretrained`` writes them as ``config.json``.

Defaults are the sizes of the published alignment study of EventGPT and Video-LLaVA (7B), where it names them.
"""

from __future__ import annotations

from transformers import PreTrainedConfig


class LinearAdapterConfig(PreTrainedConfig):
    """Of :class:`specfuse.adapters.LinearAdapter`.

    Args:
        in_features: width of the drafter's features.
        features: width D of the target's; None means the same.
    """

    model_type = "specfuse_linear_adapter"

    in_features: int = 1024
    features: int | None = None


class ResidualMLPAdapterConfig(PreTrainedConfig):
    """Of :class:`specfuse.adapters.ResidualMLPAdapter`.

    Args:
        features: width D.
        width: hidden width R.
    """

    model_type = "specfuse_residual_mlp_adapter"

    features: int = 1024
    width: int = 512


class LightweightAdapterConfig(PreTrainedConfig):
    """Of :class:`specfuse.adapters.LightweightAdapter`; D = 150,528 are the pixels of 224 x 224 in RGB.

    Args:
        features: width D.
        width: bottleneck R.
        dropout: after the first ReLU, while training.
    """

    model_type = "specfuse_lightweight_adapter"

    features: int = 1024
    width: int = 512
    dropout: float = 0.1


class CrossAttentionAlignerConfig(PreTrainedConfig):
    """Of :class:`specfuse.adapters.CrossAttentionAligner`.

    Args:
        features: width D of the queries and of what comes out.
        context_features: width C of the keys and values.
        heads: h, a divisor of D.
        places: tokens N of every input where each stands for a place of a picture; None where N may vary.
        context_places: tokens M of every context, likewise.
    """

    model_type = "specfuse_cross_attention_aligner"

    features: int = 4096
    context_features: int = 1024
    heads: int = 32
    places: int | None = None
    context_places: int | None = None


class TokenExpanderConfig(PreTrainedConfig):
    """Of :class:`specfuse.adapters.TokenExpander`.

    Args:
        in_features: width I of the tokens that come in.
        features: width D of those that go out; None means the same.
        width: hidden width R.
        factor: tokens for each token.
        places: tokens N of every input where each stands for a place of a picture; None where N may vary.
    """

    model_type = "specfuse_token_expander"

    in_features: int = 4096
    features: int | None = None
    width: int = 1024
    factor: int = 4
    places: int | None = None


class TokenAlignmentAdapterConfig(PreTrainedConfig):
    """Of :class:`specfuse.adapters.TokenAlignmentAdapter`.

    Args:
        vocab_size: V.
        rank: R of what is added to the identity.
    """

    model_type = "specfuse_token_alignment_adapter"

    vocab_size: int = 32000
    rank: int = 64


class CompressionDrafterConfig(PreTrainedConfig):
    """Of :class:`specfuse.adapters.CompressionDrafter`.

    Args:
        features: width D of the compressed states.
        vocab_size: V.
        width: W of the decoder.
        layers: of the decoder.
        heads: a divisor of W.
        horizon: K tokens that are predicted at once.
        context: most tokens of the text so far that are read.
    """

    model_type = "specfuse_compression_drafter"

    features: int = 4096
    vocab_size: int = 32000
    width: int = 512
    layers: int = 2
    heads: int = 8
    horizon: int = 16
    context: int = 8
