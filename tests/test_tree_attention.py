"""``tree_attention``: every implementation == the float64 definition; what may not be read is not read."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor
from tree_attention_cases import CASES, TreeCase, assert_close, definition, tree_case

from specfuse.kernels.tree_attention_ref import tree_attention_ref
from specfuse.ops import tree_attention as package_level
from specfuse.ops.tree_attention import tree_attention
from specfuse.tree import TokenTree

op = torch.ops.specfuse.tree_attention.default
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def test_it_is_exported() -> None:
    assert package_level is tree_attention


def call(x: dict, **options: object) -> Tensor:
    given = {k: v for k, v in x.items() if k not in ("q", "k_cache", "v_cache", "lengths", "ancestors")}
    first = (x[name] for name in ("q", "k_cache", "v_cache", "lengths", "ancestors"))
    return tree_attention(*first, **given, **options)


def dense_definition(x: dict) -> Tensor:
    """A second reading of the definition: one softmax over all slots with a mask, in float64."""
    B, H, N, D = x["q"].shape
    group = H // x["k_cache"].shape[1]
    out = torch.zeros(B, H, N, D, dtype=torch.float64)
    for b in range(B):
        end, tail = int(x["lengths"][b]), x["tail"]
        k, v = x["k_cache"][b], x["v_cache"][b]
        if x["k_tree"] is not None:
            k, v = (torch.cat([a[:, :end], t[b]], 1) for a, t in ((k, x["k_tree"]), (v, x["v_tree"])))
        mask = torch.zeros(N, k.shape[1], dtype=torch.bool)
        mask[:, 0 if x["starts"] is None else int(x["starts"][b]) : end] = True
        for i in range(N):
            for j in range(tail):
                mask[i, end + j] = bool(int(x["ancestors"][b, i]) >> j & 1)
        k, v = (t.double().nan_to_num().repeat_interleave(group, 0) for t in (k, v))
        scores = (x["q"][b].double() @ k.mT * D**-0.5).masked_fill(~mask, -torch.inf)
        out[b] = torch.softmax(scores, -1).nan_to_num() @ v
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_definition(case: TreeCase) -> None:
    x = tree_case(case, torch.float64)
    torch.testing.assert_close(definition(x), dense_definition(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "torch", "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_definition(case: TreeCase, dtype: torch.dtype, implementation: str) -> None:
    x = tree_case(case, dtype)
    if implementation == "torch" and dtype == torch.float64:
        # Its log-sum-exp is a float32 where PyTorch's flash attention says so.
        torch.testing.assert_close(call(x, implementation="torch"), definition(x), atol=1e-6, rtol=0)
    else:
        assert_close(call(x, implementation=implementation), x)


def test_the_comparison_sees_a_wrong_bit_and_a_wrong_length() -> None:
    x = tree_case(TreeCase(9, [30, 20]), torch.float32)
    wrong = dict(x, ancestors=x["ancestors"].clone())
    wrong["ancestors"][1, 8] ^= 1 << int(wrong["ancestors"][1, 8]).bit_length() - 2
    with pytest.raises(AssertionError, match=r"\[b, h, n, d\] = \[1, "):
        assert_close(call(wrong), x)
    with pytest.raises(AssertionError, match="instead of"):
        assert_close(call(x | {"starts": torch.tensor([1, 0])}), x)


def test_a_node_without_anything_to_see_gets_zeros() -> None:
    x = tree_case(TreeCase(4, [0, 3], padding=1))
    for implementation in ("sdpa", "torch"):
        out = call(x, implementation=implementation)
        assert torch.equal(out[0, :, 3], torch.zeros(4, 64))
        assert bool(out[1, :, 3].abs().sum() > 0)  # its row has a prefix


def test_rows_in_one_call_equal_rows_alone() -> None:
    x = tree_case(TreeCase(5, [33, 33, 12], starts=[4, 0, 2]))
    out = call(x)
    for b in range(3):
        alone = {k: v[b : b + 1] if isinstance(v, Tensor) else v for k, v in x.items()}
        torch.testing.assert_close(call(alone), out[b : b + 1], atol=1e-6, rtol=0)


def test_ancestor_bits_of_a_token_tree_with_64_nodes() -> None:
    tree = TokenTree.from_parents([list(range(64))], [[-1, *range(63)]])
    x = tree_case(TreeCase(64, [10]))
    x["ancestors"] = tree.ancestor_bits()
    assert x["ancestors"].dtype == torch.uint64
    signed = dict(x, ancestors=x["ancestors"].view(torch.int64))
    assert int(signed["ancestors"][0, 63]) == -1
    assert_close(call(x), signed)


@pytest.mark.parametrize("implementation", ["sdpa", "torch"])
def test_views_and_strides(implementation: str) -> None:
    x = tree_case(TreeCase(5, [40, 21], G=4, D=80))  # one query head per kv head: packing rows copies nothing
    plain = call(x, implementation=implementation)
    for extra, name in enumerate(("k_cache", "v_cache")):
        B, G, S, D = x[name].shape
        larger = torch.full((B + 1, S + 2 + extra, G + 1 + extra, D + 16), torch.nan)
        x[name] = larger[1:, 1 : S + 1, :G, 8 : 8 + D].transpose(1, 2).copy_(x[name])
    q = x["q"]
    for x["q"] in (q.transpose(1, 2).contiguous().transpose(1, 2), q.mT.contiguous().mT):
        out = call(x, implementation=implementation, longest=40)
        torch.testing.assert_close(out, plain, atol=1e-6, rtol=0)
        assert out.transpose(1, 2).is_contiguous()


def test_empty_batch_and_scale_and_int32() -> None:
    empty = tree_case(TreeCase(3, [5]))
    empty = {k: v[:0] if isinstance(v, Tensor) else v for k, v in empty.items()}
    for implementation in ("sdpa", "torch"):
        assert call(empty, implementation=implementation).shape == (0, 4, 3, 64)
    x = tree_case(TreeCase(3, [5, 9], starts=[1, 0]), torch.float64)
    expected = tree_attention_ref(**x, scale=0.3)
    narrow = x | {"lengths": x["lengths"].int(), "starts": x["starts"].int()}
    torch.testing.assert_close(call(narrow, scale=0.3), expected, atol=1e-12, rtol=0)


BAD = {
    "q": ({"q": torch.zeros(2, 4, 64)}, r"q must be \[B, H, N, D\] .* got \[2, 4, 64\]"),
    "no tail to go by": ({"q": torch.zeros(64), "tail": None}, r"q must be \[B, H, N, D\] .* got \[64\]"),
    "integers": ({"q": torch.zeros(2, 4, 3, 64).int()}, "q must be .* float16, bfloat16, .* got .*int32"),
    "8 bits": ({"q": torch.zeros(2, 4, 3, 64).to(torch.float8_e4m3fn)}, "q must be .* got .*float8"),
    "no D": ({"q": torch.zeros(2, 4, 3, 0)}, r"q must be .* with D >= 1, got \[2, 4, 3, 0\]"),
    "flat cache": ({"k_cache": torch.zeros(64)}, r"k_cache must be \[B, G, Smax, D\], got \[64\]"),
    "65 nodes": ({"q": torch.zeros(2, 4, 65, 64), "tail": None}, "N = 65, tail = 65"),
    "heads": ({"q": torch.zeros(2, 5, 3, 64)}, "q has 5 heads, which must be a multiple of the 2 heads"),
    "k_cache": ({"k_cache": torch.zeros(2, 2, 9, 32)}, r"k_cache must be \[2, 2, 9, 64\]"),
    "v_cache": ({"v_cache": torch.zeros(2, 2, 8, 64)}, r"v_cache must be .* got \[2, 2, 8, 64\]"),
    "dtype": ({"v_cache": torch.zeros(2, 2, 11, 64).half()}, "v_cache must be .* got .*float16"),
    "strides": ({"k_cache": torch.zeros(2, 2, 64, 11).mT}, "k_cache must be contiguous in its last"),
    "k_tree": ({"k_tree": torch.zeros(2, 2, 3, 64)}, "k_tree and v_tree must be given together"),
    "lengths": ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths must be \[2\] int64"),
    "ancestors": ({"ancestors": torch.ones(2, 3)}, r"ancestors must be \[2, 3\] int64"),
    "too long": ({"lengths": torch.tensor([5, 9])}, r"lengths\[1\] = 9 does not fit"),
    "start": ({"starts": torch.tensor([6, 0])}, r"lengths\[0\] = 5 does not fit: starts 6"),
    "longest": ({"longest": 4}, r"lengths\[0\] = 5 does not fit: .*longest 4"),
    "name": ({"implementation": "xformers"}, "implementation must be one of .* got 'xformers'"),
    "triton": ({"implementation": "triton"}, "implementation='triton' needs (tensors on a GPU|Triton)"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_arguments_are_named(name: str) -> None:
    x = tree_case(TreeCase(3, [5, 4]))
    assert torch.isfinite(call(x)).all()
    changes, message = BAD[name]
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(x | changes)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k_tree", "v_tree"])
def test_forward_only(name: str) -> None:
    x = tree_case(TreeCase(3, [5], own=True))
    x[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} must not require grad: tree_attention is forward only"):
        call(x)
    with torch.no_grad():
        assert not call(x).requires_grad


def test_flash_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    # flash-attn 4 installs a package of this name without the function.
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    with pytest.raises(ImportError, match="needs flash-attn 2"):
        call(tree_case(TreeCase(3, [5])), implementation="flash")


@pytest.mark.parametrize("case", [c for c in CASES if c.D % 8 == 0], ids=str)
def test_flash_with_a_stand_in_for_the_package(case: TreeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments and results are those of flash_attn_with_kvcache; its kernel is imitated."""

    def stand_in(
        q, k_cache, v_cache, *, cache_seqlens, cache_leftpad=None, softmax_scale, return_softmax_lse
    ):
        assert return_softmax_lse and cache_seqlens.dtype == torch.int32
        out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[0], q.shape[2], q.shape[1]), torch.inf)
        for b, end in enumerate(cache_seqlens.tolist()):
            first = 0 if cache_leftpad is None else int(cache_leftpad[b])
            if end > first:
                k, v = k_cache[b, first:end].transpose(0, 1), v_cache[b, first:end].transpose(0, 1)
                scores = q[b].transpose(0, 1) @ k.mT * softmax_scale
                lse[b] = scores.logsumexp(-1)
                out[b] = (scores.softmax(-1) @ v).transpose(0, 1)
        return out, lse

    package = types.ModuleType("flash_attn")
    package.flash_attn_with_kvcache = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    x = tree_case(case)
    assert_close(call(x, implementation="flash"), x)


@pytest.mark.parametrize("case", [CASES[5], CASES[7], CASES[10]], ids=str)
def test_opcheck(case: TreeCase) -> None:
    x = tree_case(case)
    x = {k: v.nan_to_num() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in x.items()}
    values = [x[k] for k in ("q", "k_cache", "v_cache", "lengths", "ancestors", "k_tree", "v_tree", "starts")]
    args = (*values, 0.1, x["tail"], max(case.lengths), "auto")
    torch.library.opcheck(op, args)


def test_compiled_in_one_graph() -> None:
    x = tree_case(TreeCase(5, [40, 21], own=True))
    compiled = torch.compile(lambda q: call(x | {"q": 2 * q}).transpose(1, 2) + 1, fullgraph=True)
    expected = call(x | {"q": 2 * x["q"]}).transpose(1, 2) + 1
    torch.testing.assert_close(compiled(x["q"]), expected, atol=1e-6, rtol=0)
