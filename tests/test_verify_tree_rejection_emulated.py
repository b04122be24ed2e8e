"""The device code of ``verify_tree_rejection`` on the CPU, under the emulator in tests/cuda_emulator."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from emulated import FLAGS, ORDERS, build_op, needs_compiler, poison, run_sanitized
from torch import Tensor
from verify_tree_cases import FILTERED, SAMPLED, assert_same, random_tree
from verify_tree_rejection_cases import WITH, draw_tree, op_arguments, to_sparse

from specfuse.kernels.verify_tree_rejection_ref import verify_tree_rejection_ref
from specfuse.ops.verify_tree_rejection import _native_call

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RULES = {"greedy": {"temperature": 0.0}, "sampled": SAMPLED, "filtered": FILTERED}
replacement = pytest.mark.parametrize("with_replacement", WITH.values(), ids=WITH.keys())
clusters = pytest.mark.parametrize("cluster", [1, 2, 8])
pytestmark = needs_compiler

# Root with four children, of which the first two have two each.
PARENTS = [-1, 0, 0, 0, 0, 1, 1, 2, 2]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return build_op("verify_tree_rejection", tmp_path_factory.mktemp("emulated"))


@pytest.fixture(params=ORDERS[1:], autouse=True)
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_EMULATOR_ORDER", request.param)


def verify(emulated: ModuleType, cluster: int, *args: object) -> tuple[Tensor, ...]:
    call, outputs, _inputs = _native_call(*args)
    scratch = torch.empty(
        emulated.verify_tree_rejection_scratch_bytes(args[0].shape[0], cluster), dtype=torch.uint8
    )
    poison(*outputs, scratch)
    emulated.verify_tree_rejection(*call, cluster, scratch.data_ptr(), 0)
    return outputs


def drafted(
    generator: torch.Generator, B: int, V: int, sparse: int | None, with_replacement: bool, **options: object
) -> tuple:
    """Honest drafts of a drafter close enough for deep walks, and far enough for rejections."""
    logits = torch.randn(B, len(PARENTS), V, generator=generator) * 2
    q = (logits + torch.randn(logits.shape, generator=generator)).softmax(-1) + 1e-6
    tokens, parents = draw_tree(q, PARENTS, with_replacement, generator)
    drafts = (q, None) if sparse is None else to_sparse(q, sparse)
    return op_arguments(logits, *drafts, with_replacement, tokens, parents, **options)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("sparse", [None, 20])
def test_dtypes_and_rules(
    emulated: ModuleType, dtype: torch.dtype, rule: dict[str, float], sparse: int | None
) -> None:
    num_nodes = torch.tensor([9, 0, 1, 6, 9, 9], dtype=torch.int32)
    args = list(drafted(torch.Generator().manual_seed(1), 6, 130, sparse, False, num_nodes=num_nodes, **rule))
    args[0] = args[0].to(dtype)
    args[1] = args[1].to(list(DTYPES.values())[sparse is None and rule["temperature"] == 0.8])
    assert_same(verify(emulated, 1, *args), verify_tree_rejection_ref(*args))


@clusters
@pytest.mark.parametrize("V", [5, 2100])
@replacement
def test_vocabularies(emulated: ModuleType, cluster: int, V: int, with_replacement: bool) -> None:
    """More and fewer tokens than a block takes at a time; slices without a token."""
    for sparse in (None, 4):
        args = drafted(torch.Generator().manual_seed(V), 4, V, sparse, with_replacement, positions=2**33 + 5)
        expected = verify_tree_rejection_ref(*args)
        assert_same(verify(emulated, cluster, *args), expected)


@replacement
@pytest.mark.parametrize("sparse", [None, 6])
def test_many_rejections(emulated: ModuleType, with_replacement: bool, sparse: int | None) -> None:
    """60 rows over 12 tokens, with drafts of q = 0, repeats, and rules that differ from row to row."""
    generator = torch.Generator().manual_seed(3)
    B, N, V = 60, 12, 12
    tokens, parents = random_tree(generator, B, N, V)
    logits = torch.randn(B, N, V, generator=generator) * 2
    logits[torch.rand(logits.shape, generator=generator) < 0.2] = -math.inf
    q = torch.rand(B, N, V, generator=generator) * (torch.rand(B, N, V, generator=generator) < 0.8)
    pick = lambda values: torch.tensor(values)[torch.randint(0, len(values), (B,), generator=generator)]  # noqa: E731
    drafts = (q, None) if sparse is None else to_sparse(q, sparse)
    if sparse:
        drafts[1][torch.rand(drafts[1].shape, generator=generator) < 0.2] = -1
    args = op_arguments(
        logits, *drafts, with_replacement, tokens, parents, temperature=pick([0.0, 0.5, 1.0, 2.0]),
        top_k=pick([0, 1, 3, 40]), top_p=pick([1.0, 0.9, 0.5]), min_p=pick([0.0, 0.1]),
        seed=torch.arange(B) - 7,
    )  # fmt: skip
    expected = verify_tree_rejection_ref(*args)
    assert (expected[1] > 1).sum() >= 10
    assert_same(verify(emulated, 2, *args), expected)


@clusters
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_rejected_tokens_leave_q(emulated: ModuleType, cluster: int, sparse: bool) -> None:
    """The second draft has a chance of 0.1, were q not rescaled 0.96; the tokens lie in several warps.

    p = (.38, .12, .5) and q = (.9, .08, .02): the rejection of the first leaves of p (0, .08, .92), of q (0,
    .8, .2).
    """
    seeds = [1, 2, 6, 8, 9, 10, 12, 14]  # whose first coin rejects
    B, V, p, q = len(seeds), 4000, torch.tensor([0.38, 0.12, 0.5]), torch.tensor([0.9, 0.08, 0.02])
    kept = torch.stack([torch.randperm(7, generator=torch.Generator().manual_seed(b))[:3] for b in range(B)])
    kept = kept * 571 + 500
    rows = kept.unsqueeze(1).expand(B, 3, 3)
    logits = torch.full((B, 3, V), -math.inf).scatter(-1, rows, p.log().expand(B, 3, 3))
    tokens = torch.cat((torch.zeros(B, 1, dtype=torch.int64), kept[:, :2]), dim=1)
    parents = torch.tensor([[-1, 0, 0]], dtype=torch.int32).repeat(B, 1)
    drafts = (torch.zeros(B, 3, V).scatter(-1, rows, q.expand(B, 3, 3)), None)
    if sparse:  # the entries of several warps, too
        ids = torch.full((B, 3, 200), -1)
        ids[..., [70, 105, 199]] = rows
        drafts = (torch.zeros(B, 3, 200).index_copy(-1, torch.tensor([70, 105, 199]), q.expand(B, 3, 3)), ids)
    args = op_arguments(logits, *drafts, False, tokens, parents, seed=torch.tensor(seeds))
    expected = verify_tree_rejection_ref(*args)
    assert not (expected[0] == 1).any() and (expected[1] == 1).sum() > B // 2
    assert_same(verify(emulated, cluster, *args), expected)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@replacement
def test_little_of_q_is_left(emulated: ModuleType, with_replacement: bool, sparse: bool) -> None:
    """A sure drafter's second draft: without the first, q is so small that p / q exceeds a float."""
    B, q = 40, torch.tensor([0.9, 1e-40, 3e-42, 0.0, 0.0])
    logits = torch.tensor([0.0, 1.0, 1.5, 0.5, -math.inf]).expand(B, 4, 5)
    tokens = torch.tensor([[0, 0, 1, 2]]).repeat(B, 1)
    parents = torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32).repeat(B, 1)
    rows = q.expand(B, 4, 5)
    drafts = to_sparse(rows, 4) if sparse else (rows, None)
    args = op_arguments(logits, *drafts, with_replacement, tokens, parents)
    expected = verify_tree_rejection_ref(*args)
    assert with_replacement or len(expected[0][:, 1].unique()) == 4  # each child, and none of them
    assert_same(verify(emulated, 2, *args), expected)


@clusters
@pytest.mark.parametrize(
    "broken", [math.nan, -math.inf, math.inf, "q nan", "q negative", "q infinite", "q zero"]
)
def test_rows_without_a_distribution(emulated: ModuleType, cluster: int, broken: float | str) -> None:
    logits, q = torch.zeros(1, 2, 70), torch.ones(1, 2, 70)
    if isinstance(broken, float):
        logits[0, 0] = broken if broken == -math.inf else 0.0
        logits[0, 0, 69] = broken
    else:
        value = {"q nan": math.nan, "q negative": -1.0, "q infinite": math.inf, "q zero": 0.0}[broken]
        q[0, 0, slice(None) if broken == "q zero" else 68] = value
    q[0, 1] = math.nan  # a leaf's: not read
    tree = (torch.tensor([[0, 1]]), torch.tensor([[-1, 0]], dtype=torch.int32))
    ids = torch.arange(70).expand(1, 2, 70).contiguous()
    for draft_ids in (None, ids):
        args = op_arguments(logits, q, draft_ids, False, *tree)
        assert_same(verify(emulated, cluster, *args), verify_tree_rejection_ref(*args))


def test_views_wide_trees_and_no_entries(emulated: ModuleType) -> None:
    N = 700  # more nodes than threads in a block
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(2, N, 43, 2, generator=generator)
    tokens = torch.randint(0, 43, (2, N), generator=generator)
    parents = torch.zeros(2, N, dtype=torch.int32)
    parents[:, 0] = -1
    for logits, q in ((base[..., 1], base[..., 0]), (base[:, :, 1:, 0], base[:, :, :42, 1])):
        args = op_arguments(logits, q, None, False, tokens, parents)
        assert_same(verify(emulated, 1, *args), verify_tree_rejection_ref(*args))
    empty = torch.zeros(2, N, 0)
    args = op_arguments(base[..., 1], empty, empty.long(), False, tokens, parents)
    assert_same(verify(emulated, 2, *args), verify_tree_rejection_ref(*args))


def test_token_sets_beyond_their_bits(emulated: ModuleType) -> None:
    """V above 131,072: tokens 131,072 apart share a bit, and a list tells them apart."""
    V = 131_072 + 40
    logits = torch.full((8, 3, V), -math.inf)
    kept = [3, 9, 131_072 + 3, 131_072 + 9, 131_072 + 20]
    generator = torch.Generator().manual_seed(5)
    logits[..., kept] = torch.randn(8, 3, 5, generator=generator)
    q = torch.zeros(8, 3, V)
    q[..., kept[1:]] = torch.rand(8, 3, 4, generator=generator)
    tokens = torch.tensor([[0, 131_072 + 3, 9]]).repeat(8, 1)
    parents = torch.tensor([[-1, 0, 0]], dtype=torch.int32).repeat(8, 1)
    for drafts in ((q, None), to_sparse(q, 4)):
        args = op_arguments(logits, *drafts, False, tokens, parents)
        assert_same(verify(emulated, 1, *args), verify_tree_rejection_ref(*args))


@pytest.mark.skipif(bool(FLAGS), reason="this process has the sanitizers already")
@pytest.mark.slow
@pytest.mark.parametrize("order", ["reverse"], indirect=True)
def test_no_read_or_write_out_of_bounds(order: None) -> None:
    """Some of this file again under the address and undefined-behaviour sanitizers."""
    some = "views or (leave_q and 2) or (dtypes and fp16 and filtered) or (distribution and 2)"
    output = run_sanitized("tests/test_verify_tree_rejection_emulated.py", "-k", f"reverse and ({some})")
    assert "12 passed" in output, output[-3000:]
