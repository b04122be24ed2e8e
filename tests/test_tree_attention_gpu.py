"""``tree_attention`` on a GPU: real sizes, half precision, offsets past 2^31, graphs, a model in float16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_tree_attention import call
from tiny_models import random_prompts, tiny_llama
from torch import Tensor
from tree_attention_cases import CASES, TreeCase, ancestor_bits, assert_close, random_parents, tree_case

from specfuse.kernels import tuned
from specfuse.ops.tree_attention import tree_attention
from specfuse.passes.tree_forward import TreeForward
from specfuse.tree import TokenTree

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def on_device(x: dict) -> dict:
    return {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in x.items()}


@pytest.mark.parametrize("implementation", ["triton", "torch", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_precision(case: TreeCase, dtype: torch.dtype, implementation: str) -> None:
    x = tree_case(case, dtype)
    assert_close(call(on_device(x), implementation=implementation).cpu(), x)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case: TreeCase) -> None:
    x = tree_case(case)
    assert_close(call(on_device(x), implementation="triton").cpu(), x, slack=4.0)


@pytest.mark.parametrize("splits", [1, 2, 5, 16])
def test_every_untuned_configuration(splits: int) -> None:
    x = tree_case(TreeCase(33, [700, 150], starts=[0, 41], H=8, D=128), torch.bfloat16)
    configs = {str(e["config"]): e["config"] for e in tuned._entries("tree_attention", None)}
    for config in configs.values():
        with tuned.override("tree_attention", config | {"splits": splits}):
            assert_close(call(on_device(x), implementation="triton").cpu(), x)


def real_case(B: int, H: int, G: int, S: int, N: int, D: int = 128) -> dict:
    """Ragged, padded rows as a long video and its questions leave them."""
    generator = torch.Generator().manual_seed(1)
    lengths = S - 37 * torch.arange(B)
    x = {
        "lengths": lengths,
        "starts": 11 * torch.arange(B),
        "ancestors": torch.tensor([ancestor_bits(random_parents(N, generator)) for _ in range(B)]),
        "tail": N,
    }
    x = on_device(x)
    shapes = {"q": (B, H, N, D), "k_cache": (B, G, S + N, D), "v_cache": (B, G, S + N, D)}
    for name, shape in shapes.items():
        x[name] = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
    return x


def dense(x: dict, dtype: torch.dtype) -> Tensor:
    group = x["q"].shape[1] // x["k_cache"].shape[1]
    slot = torch.arange(x["k_cache"].shape[2], device=DEVICE)
    node = slot - x["lengths"][:, None]
    mask = ((slot >= x["starts"][:, None]) & (node < 0))[:, None].repeat(1, x["tail"], 1)
    bits = x["ancestors"][:, :, None] >> node.clamp(0, 63)[:, None] & 1
    mask |= (bits == 1) & ((node >= 0) & (node < x["tail"]))[:, None]
    k, v = (x[name].to(dtype).repeat_interleave(group, 1) for name in ("k_cache", "v_cache"))
    return F.scaled_dot_product_attention(x["q"].to(dtype), k, v, attn_mask=mask[:, None])


@pytest.mark.parametrize("N", [16, 32, 64])
@pytest.mark.parametrize("G", [32, 8])
@pytest.mark.parametrize(("B", "S"), [(1, 2091), (8, 4643)])
def test_real_sizes(B: int, S: int, G: int, N: int) -> None:
    x = real_case(B, 32, G, S, N)
    truth, eager = dense(x, torch.float32), dense(x, torch.bfloat16).float()
    allowed = 2 * float((eager - truth).abs().max()) + 1e-3
    for implementation in ("triton", "torch", "sdpa"):
        error = (call(x, implementation=implementation).float() - truth).abs()
        assert float(error.max()) <= allowed, f"{implementation}: {float(error.max())}, allowed {allowed}"


@pytest.mark.parametrize("heads_first", [True, False], ids=["G-Smax", "Smax-G"])
def test_offsets_past_2_to_the_31(heads_first: bool) -> None:
    """Row 1 begins, and the last slots of row 0 lie, beyond 2^31 elements. Keys serve as values."""
    slots, G, N, D = 2**24 + 1000, 2, 5, 64
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    shape = (2, G, slots, D) if heads_first else (2, slots, G, D)
    cache = torch.empty(shape, dtype=torch.float16, device=DEVICE)
    cache = cache if heads_first else cache.transpose(1, 2)
    ends = [slots - N - 3, slots - N]
    for b, end in enumerate(ends):
        cache[b, :, end - 300 : end + N] = torch.randn(G, 300 + N, D, device=DEVICE).half()
    x = tree_case(TreeCase(N, [300, 300]), torch.float16)
    window = [cache[b, :, end - 300 : end + N] for b, end in enumerate(ends)]
    x["k_cache"] = x["v_cache"] = torch.stack(window).cpu()
    far = on_device(x | {"lengths": torch.tensor(ends), "starts": torch.tensor(ends) - 300})
    far |= {"k_cache": cache, "v_cache": cache}
    assert_close(call(far, implementation="triton").cpu(), x)


def test_a_captured_graph_follows_lengths_and_trees() -> None:
    x = real_case(2, 8, 2, 700, 16)
    args = [x[name] for name in ("q", "k_cache", "v_cache", "lengths", "ancestors")]
    tree_attention(*args, starts=x["starts"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tree_attention(*args, starts=x["starts"])
    for lengths in ([700, 663], [64, 1], [345, 200]):
        x["lengths"].copy_(torch.tensor(lengths))
        x["starts"].copy_(torch.tensor([0, lengths[1] // 2]))
        x["ancestors"].copy_(x["ancestors"].roll(1, dims=0))
        graph.replay()
        torch.testing.assert_close(out.float(), dense(x, torch.float32), atol=2e-2, rtol=0)


def test_auto_is_triton_for_half_precision_only() -> None:
    x = real_case(1, 4, 2, 300, 7)
    assert torch.equal(call(x), call(x, implementation="triton"))
    wide = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in x.items()}
    assert torch.equal(call(wide), call(wide, implementation="sdpa"))


def test_a_float16_model_gives_the_logits_of_the_dense_mask() -> None:
    model = tiny_llama(seed=0, dtype=torch.float16, hidden=256, heads=4, kv_heads=2).to(DEVICE)
    inputs = random_prompts(model, 3)
    tree = TokenTree.from_parents([[5, 6, 7, 8, 9, 10]] * 3, [[-1, 0, 0, 1, 2, 2]] * 3)
    logits = {}
    for implementation in ("sdpa", "specfuse_tree"):
        model.set_attn_implementation(implementation)
        forward = TreeForward(model, 3, 256)
        assert forward.takes_tree == (implementation == "specfuse_tree")
        with torch.no_grad():
            forward.prefill({"input_ids": inputs["input_ids"]}, inputs["attention_mask"])
            logits[implementation] = forward.forward_tree(tree, inputs["attention_mask"].sum(1) - 1).float()
    model.float().set_attn_implementation("sdpa")
    forward = TreeForward(model, 3, 256)
    with torch.no_grad():
        forward.prefill({"input_ids": inputs["input_ids"]}, inputs["attention_mask"])
        truth = forward.forward_tree(tree, inputs["attention_mask"].sum(1) - 1)
    errors = {name: float((values - truth).abs().max()) for name, values in logits.items()}
    assert errors["specfuse_tree"] <= 2 * errors["sdpa"] + 1e-2, errors
