"""Builds of lm_head_verify and of the noise it draws: the configurations of kernels/configs, every dtype."""

from __future__ import annotations

import json

from compile_triton import HERE, CompileCase

from specfuse.kernels.lm_head_verify import UNALIGNED, lm_head_verify_kernel, merge_kernel, walk_kernel

CONFIGS = json.loads((HERE.parent / "kernels/configs/lm_head_verify.json").read_text())["entries"]
POINTERS = {"parents": "*i32", "temperature": "*fp32", "seed": "*i64", "positions": "*i64"}
POINTERS |= {"tile_floats": "*fp32", "tile_tokens": "*i32"}
SIZES = dict.fromkeys(("stride_hb", "stride_hn", "stride_wv", "N", "rows", "V", "D", "tiles"), "i32")
REGISTERS = {16: 176, 32: 255, 64: 232, 128: 232}  # by BLOCK_M


def head(dtype: str, config: dict[str, int], bias: bool = True, aligned: bool = True) -> CompileCase:
    blocks = {key: value for key, value in config.items() if key.startswith("BLOCK")}
    shape = "x".join(str(size) for size in blocks.values())
    # What a launch finds to be multiples of 16 wherever it takes a tuned configuration.
    divisible = ("hidden", "weight", "stride_hb", "stride_hn", "stride_wv", "D", "tile_floats", "tile_tokens")
    return CompileCase(
        name=f"lm_head_verify {dtype} {shape}{' bias' if bias else ''}{'' if aligned else ' unaligned'}",
        kernel=lm_head_verify_kernel,
        signature={**dict.fromkeys(("hidden", "weight", "bias"), f"*{dtype}"), **POINTERS, **SIZES},
        constexprs={"stride_hd": 1, "stride_wd": 1, "HAS_BIAS": bias, **blocks},
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        max_registers=REGISTERS[config["BLOCK_M"]],
        max_shared=100_000,
        divisible16=divisible if aligned else (),
        contains={"90": "wgmma"} if config["BLOCK_M"] >= 64 else {},
    )


OUT = {"choice": "*i64", "logprob": "*fp32", "tokens": "*i64", "num_nodes": "*i32", "path": "*i32"}
OUT |= {"length": "*i32", "next_token": "*i64", "logprobs": "*fp32"}

BY_DTYPE = {2: ("bf16", "fp16"), 4: ("fp32",)}
CASES = [
    head(dtype, entry["config"], bias=dtype != "fp16")
    for entry in CONFIGS
    for dtype in BY_DTYPE[entry["sizes"]["itemsize"]]
    if dtype != "fp16" or entry["sizes"]["M"] == 64
]
CASES += [head(dtype, UNALIGNED, aligned=False) for dtype in ("bf16", "fp32")]
CASES += [
    CompileCase("lm_head_verify merge", merge_kernel, {**POINTERS, **OUT, **SIZES}, {"BLOCK_T": block}, 4, 1,
                max_registers=128, max_shared=1024)
    for block in (256, 2048)
]  # fmt: skip
CASES += [
    CompileCase("lm_head_verify walk", walk_kernel, {**POINTERS, **OUT, **SIZES}, {"BLOCK_N": block}, 4, 1,
                max_registers=128, max_shared=1024)
    for block in (64, 1024)
]  # fmt: skip
