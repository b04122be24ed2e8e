"""The fused ops: one contract file each, registered as ``torch.ops.specfuse.<op>``."""

from __future__ import annotations

from specfuse.ops.adapter_cosine import AlignedScore, adapter_cosine
from specfuse.ops.compact_kv import compact_kv
from specfuse.ops.implementations import implementations, self_test
from specfuse.ops.lm_head_verify import lm_head_verify
from specfuse.ops.tree_attention import tree_attention
from specfuse.ops.verify_tree import AcceptedPath, verify_tree
from specfuse.ops.verify_tree_rejection import verify_tree_rejection

__all__ = [
    "AcceptedPath",
    "AlignedScore",
    "adapter_cosine",
    "compact_kv",
    "implementations",
    "lm_head_verify",
    "self_test",
    "tree_attention",
    "verify_tree",
    "verify_tree_rejection",
]
