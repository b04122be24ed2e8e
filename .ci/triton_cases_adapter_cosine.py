"""Builds of adapter_cosine: the configurations of kernels/configs/adapter_cosine.json, at both ends of M."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compile_triton import CompileCase

from specfuse.kernels.adapter_cosine import SMALL_TILES
from specfuse.kernels.adapter_cosine_down import activate_kernel, down_kernel, middle_kernel
from specfuse.kernels.adapter_cosine_up import score_kernel, up_kernel

CONFIGS = Path(__file__).resolve().parents[1] / "kernels" / "configs" / "adapter_cosine.json"


def small_tiles(config: dict[str, Any]) -> dict[str, Any]:
    return {k: min(v, SMALL_TILES.get(k, v)) for k, v in config.items()}


def case(
    name: str,
    kernel: Any,
    config: dict[str, Any],
    part: str,
    constexprs: dict[str, Any],
    types: dict[str, str],
    *,
    dtype: str = "bf16",
    tensor_cores: bool = False,
    max_registers: int = 255,
    max_shared: int = 101_376,
    ones: tuple[str, ...] = (),
    odd: bool = False,
) -> CompileCase:
    """Pointers are of the storage dtype and integers i32 unless ``types`` says otherwise."""
    blocks = {f"BLOCK_{axis}": config.get(f"{part}_{axis}") for axis in "MNK"}
    constants = {k: v for k, v in blocks.items() if k in kernel.arg_names} | constexprs
    constants |= {name: 1 for name in ones if name in kernel.arg_names}
    signature = {}
    for arg in kernel.arg_names:
        if arg not in constants:
            signature[arg] = types.get(arg, f"*{dtype}" if arg.startswith("p_") else "i32")
    aligned = [arg for arg in signature if arg.startswith("p_")]
    if not odd:  # sizes and row strides of real models are multiples of 16
        aligned += [a for a in ("D", "R", "stride_x", "stride_h", "stride_t") if a in signature]
    contains = {"90": "wgmma"} if tensor_cores else {}
    if "p_arrivals" in signature and kernel is not down_kernel and constexprs.get("LAST_BLOCK", True):
        # What the last block reads was written by others: their counts release, its count acquires, and
        # between the stores of all threads and the count of one lies a barrier.
        contains["80"] = r"bar\.sync(?:(?!st\.global)[\s\S])*?atom\.global\.gpu\.acq_rel\.add"
    return CompileCase(
        f"adapter_cosine {name}",
        kernel,
        signature,
        constants,
        config.get(f"{part}_WARPS", 4),
        config.get(f"{part}_STAGES", 3),
        max_registers,
        max_shared,
        divisible16=tuple(aligned),
        contains=contains,
    )


FLOATS = {"eps": "fp32", "threshold": "fp32"}
SCORES = {"p_partial": "*fp32", "p_score": "*fp32", "p_accept": "*u8", "p_arrivals": "*i32", **FLOATS}


def chain(
    label: str, c: dict[str, Any], dtype: str, large: bool, ones: tuple[str, ...] = (), odd: bool = False
) -> list[CompileCase]:
    """The three launches of the lightweight adapter and the activation of the residual MLP."""
    splits = c["SPLITS"]
    scratch = "*fp32" if splits > 1 else f"*{dtype}"
    wide = large and dtype != "fp32" and not odd
    common: dict[str, Any] = {"dtype": dtype, "ones": ones, "odd": odd}
    down = {"p_out": scratch, "p_arrivals": "*i32"}
    middle = {"p_z": scratch, "p_mid": scratch, "p_arrivals": "*i32", **FLOATS}
    up = {"RESIDUAL": True, "WRITE": False, "LAST_BLOCK": True}
    return [
        case(f"down {label}", down_kernel, c, "DOWN", {"SPLITS": splits, "GELU": False}, down,
             tensor_cores=wide, **common),
        case(f"middle {label}", middle_kernel, c, "MID", {"SPLITS": splits}, middle,
             tensor_cores=wide, **common),
        case(f"activate {label}", activate_kernel, c | {"MID_N": None}, "MID", {"SPLITS": splits},
             {"p_z": scratch}, **common),
        case(f"up {label}", up_kernel, c, "UP", up, SCORES, tensor_cores=wide, **common),
    ]  # fmt: skip


def every_configuration() -> list[CompileCase]:
    """All kernels under all entries of the file; what differs in nothing is built once."""
    cases: dict[str, CompileCase] = {}
    for entry in json.loads(CONFIGS.read_text())["entries"]:
        label = "-".join(f"{letter}{size}" for letter, size in entry["sizes"].items())
        large = entry["sizes"]["M"] >= 1024
        for built in chain(f"{label}-bf16", entry["config"], "bf16", large=large):
            key = repr((built.kernel.__name__, built.constexprs, built.num_warps, built.num_stages))
            cases.setdefault(key, built)
    return list(cases.values())


ENTRIES = {tuple(e["sizes"].values()): e["config"] for e in json.loads(CONFIGS.read_text())["entries"]}
LARGE, SMALL = ENTRIES[4096, 4096, 1024], ENTRIES[1, 4096, 256]
CASES = [
    *every_configuration(),
    *chain("M64-fp16", ENTRIES[64, 4096, 1024], "fp16", large=False),
    *chain("odd-M4096-bf16", small_tiles(LARGE), "bf16", large=True, odd=True),
    *chain("odd-M1-bf16", small_tiles(SMALL), "bf16", large=False, odd=True),
    *chain("D1-R1-bf16", small_tiles(SMALL), "bf16", large=False, ones=("D", "R"), odd=True),
    *chain("M4096-fp32", small_tiles(LARGE), "fp32", large=True),
    case("down+GELU M4096-bf16", down_kernel, LARGE, "DOWN", {"SPLITS": 1, "GELU": True},
         {"p_arrivals": "*i32"}, tensor_cores=True),
    case("up aligned M4096-bf16", up_kernel, LARGE, "UP",
         {"RESIDUAL": True, "WRITE": True, "LAST_BLOCK": True}, SCORES, tensor_cores=True),
    case("up linear M4096-bf16", up_kernel, LARGE, "UP",
         {"RESIDUAL": False, "WRITE": False, "LAST_BLOCK": False}, SCORES, tensor_cores=True),
    case("score", score_kernel, {"SCORE_M": 32}, "SCORE", {}, SCORES),
]  # fmt: skip
