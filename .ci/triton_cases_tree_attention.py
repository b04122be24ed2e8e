"""Ahead-of-time builds of ``tree_attention``: head dims, row tiles of a small and a large tree, dtypes."""

from __future__ import annotations

from compile_triton import ARCHS, CompileCase

from specfuse.kernels.tree_attention import tree_attention_kernel, tree_attention_merge_kernel

_AXES = {"q": "bhn", "k": "bgs", "v": "bgs", "kt": "bgt", "vt": "bgt", "o": "bhn"}
_STRIDES = [f"{t}_{i}" for t, axes in _AXES.items() for i in axes]
_SIZES = ["G", "N", "M", "T", "Smax", "splits", "row_tiles"]


def _attention(
    dtype: str,
    D: int,
    M: int,
    warps: int,
    stages: int,
    registers: int,
    shared: int,
    *,
    block_s: int = 64,
    partial: bool = True,
    in_cache: bool = True,
    contains: dict[str, str] | None = None,
    archs: tuple[str, ...] = ARCHS,
    ones: tuple[str, ...] = (),
) -> CompileCase:
    """One build, as the launcher of kernels/tree_attention.py asks for it; ``ones`` are sizes that are 1."""
    block_d = 64 if D == 64 else 128
    out = "*fp32" if partial else f"*{dtype}"
    return CompileCase(
        name=f"tree_attention {dtype} D{D} M{M} S{block_s} {'split' if partial else 'whole'}"
        f"{'' if in_cache else ' own tree'}{' ones' if ones else ''}",
        kernel=tree_attention_kernel,
        signature={f"p_{name}": f"*{dtype}" for name in ("q", "k", "v", "k_tree", "v_tree")}
        | {f"p_{name}": "*i64" for name in ("bits", "lengths", "starts")}
        | {"p_out": out, "p_lse": "*fp32", "scale_log2": "fp32"}
        | dict.fromkeys([*_SIZES, *_STRIDES], "i32"),
        constexprs={
            "D": D,
            "BLOCK_M": M,
            "BLOCK_S": block_s,
            "BLOCK_T": 32,
            "BLOCK_D": block_d,
            "HAS_TREE": not in_cache,
            "HAS_STARTS": in_cache,
            "PARTIAL": partial,
            **dict.fromkeys(ones, 1),
        },
        num_warps=warps,
        num_stages=stages,
        max_registers=registers,
        max_shared=shared,
        divisible16=(
            *(f"p_{name}" for name in ("q", "k", "v", "k_tree", "v_tree", "bits", "lengths", "out", "lse")),
            *_STRIDES,
        ),
        contains=contains or {},
        archs=archs,
    )


# The untuned configurations of kernels/configs/tree_attention.json; the smaller devices take fewer stages.
_SMALL, _LARGE = ("80", "89", "120"), ("90", "100")
CASES = [
    _attention("bf16", 128, 16, 4, 3, 128, 40_000, block_s=32, archs=_SMALL),
    _attention("bf16", 128, 16, 4, 4, 128, 56_000, block_s=32, archs=_LARGE),
    _attention("bf16", 128, 32, 4, 2, 255, 49_152, archs=_SMALL),
    _attention("bf16", 128, 32, 4, 5, 255, 81_920, block_s=32, archs=("90",)),
    _attention("bf16", 128, 32, 4, 3, 255, 81_920, archs=("100",)),
    _attention("bf16", 128, 64, 8, 2, 255, 65_536, archs=_SMALL),
    _attention("bf16", 128, 64, 4, 4, 255, 163_840, archs=_LARGE, contains={"90": "wgmma"}),
    _attention("bf16", 128, 128, 8, 2, 255, 81_920, archs=_SMALL),
    _attention("bf16", 128, 128, 8, 3, 255, 147_456, archs=_LARGE, contains={"90": "wgmma"}),
    _attention("fp16", 80, 64, 8, 2, 255, 98_304, partial=False),
    _attention("fp16", 64, 64, 4, 2, 255, 49_152, in_cache=False),
    _attention("fp32", 96, 16, 4, 1, 255, 49_152, block_s=32),
    # Triton compiles arguments that are 1 into the code.
    _attention(
        *("bf16", 96, 16, 4, 3, 128, 40_000),
        block_s=32,
        partial=False,
        ones=("G", "N", "T", "splits", "row_tiles"),
    ),
    CompileCase(
        name="tree_attention merge bf16 D128 of 8",
        kernel=tree_attention_merge_kernel,
        signature={"p_parts": "*fp32", "p_lse": "*fp32", "p_out": "*bf16"}
        | dict.fromkeys(["G", "N", "M", "splits", "o_b", "o_h", "o_n"], "i32"),
        constexprs={"D": 128, "BLOCK_K": 8, "BLOCK_D": 128},
        num_warps=2,
        num_stages=1,
        max_registers=128,
        max_shared=4096,
        divisible16=("p_parts", "p_lse", "p_out", "o_b", "o_h", "o_n"),
    ),
]
