"""``attn_implementation="specfuse_tree"``: Hugging Face attention that knows draft trees.

Under ``model.generate`` it is transformers' own sdpa, mask and all. In a pass over a tree, specfuse hands the
layers a :class:`TreeMask` instead of a dense mask and attention runs ``tree_attention`` on the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specfuse.ops.tree_attention import tree_attention

NAME = "specfuse_tree"


class TreeMask(Tensor):
    """The ancestor bits ``[B, 1, N, 1]`` int64 of a pass over trees, with what else attention must know.

    Transformers hands a 4-D mask to every layer as it is. Code that takes this one for a dense mask fails,
    since attention takes no integer mask: nothing is silently wrong.
    """

    # Whatever is made of the mask is an ordinary tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    lengths: Tensor  # [B] int64 committed slots of each row
    starts: Tensor | None  # [B] int64 first valid slot of each row; None: no padding
    tail: int  # slots behind the committed ones that bits may name
    longest: int  # the largest of lengths
    read: bool  # an attention layer has taken it

    @staticmethod
    def wrap(bits: Tensor, lengths: Tensor, starts: Tensor | None, tail: int, longest: int) -> TreeMask:
        """The mask of ``bits [B, N]`` and the arguments of :func:`specfuse.tree_attention`."""
        mask = bits[:, None, :, None].as_subclass(TreeMask)
        mask.lengths, mask.starts, mask.tail, mask.longest = lengths, starts, tail, longest
        mask.read = False
        return mask

    def bits(self) -> Tensor:
        """``[B, N]`` int64."""
        return self.as_subclass(Tensor)[:, 0, :, 0]


def tree_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: ``query [B, H, N, D]``, ``key`` and ``value [B, G, slots, D]``.

    Raises:
        ValueError: attention sinks, which sdpa and tree_attention would leave out; and, in a tree pass, a
            soft cap, a position bias, or values of another head dim than keys.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"attn_implementation={NAME!r} knows no attention sinks (s_aux); use 'eager'")
    if not isinstance(attention_mask, TreeMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in ("softcap", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation={NAME!r} takes no {name} in a tree pass; use 'eager'")
    if key.shape[-1] != value.shape[-1]:
        raise ValueError(
            f"attn_implementation={NAME!r} needs keys and values of one head dim in a tree pass, got "
            f"{key.shape[-1]} and {value.shape[-1]}; use 'sdpa'"
        )
    attention_mask.read = True
    out = tree_attention(
        *(query, key, value, attention_mask.lengths, attention_mask.bits()),
        starts=attention_mask.starts,
        scale=scaling,
        tail=attention_mask.tail,
        longest=attention_mask.longest,
    )
    return out.transpose(1, 2), None


def register_attention() -> str:
    """Makes ``attn_implementation="specfuse_tree"`` known to transformers; returns that name.

    Needed before ``from_pretrained(..., attn_implementation="specfuse_tree")`` unless specfuse's generation
    was imported already, which does it too.

        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=specfuse.register_attention())
    """
    AttentionInterface.register(NAME, tree_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


register_attention()
