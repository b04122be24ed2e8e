"""``verify_tree_rejection``: what its rows may depend on, what it refuses, how it is registered, and CUDA."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from verify_tree_cases import FILTERED, SAMPLED, assert_same, random_tree
from verify_tree_rejection_cases import DTYPE_IDS, DTYPES, WITH, draw_tree, op_arguments, to_sparse

from specfuse.ops import native, verify_tree_rejection
from specfuse.ops.verify_tree_rejection import _reference
from specfuse.tree import TokenTree

op = torch.ops.specfuse.verify_tree_rejection.default
replacement = pytest.mark.parametrize("with_replacement", WITH.values(), ids=WITH.keys())
layouts = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
NAMES = ("logits", "draft_probs", "draft_ids", "with_replacement", "tokens", "parents", "num_nodes")
NAMES += ("temperature", "top_k", "top_p", "min_p", "seed", "positions")


def batch(sparse: bool = False, V: int = 11, B: int = 6, N: int = 9) -> dict[str, Tensor | bool | None]:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(B, N, V, generator=generator)
    q = (logits + 0.3 * torch.randn(B, N, V, generator=generator)).softmax(-1)
    tokens, parents = draw_tree(q, [-1, 0, 0, 0, 1, 1, 2, 4, 7][:N], False, generator)
    args = op_arguments(
        logits, *(to_sparse(q, 5) if sparse else (q, None)), False, tokens, parents,
        torch.tensor([9, 5, 1, 0, 9, 7], dtype=torch.int32), temperature=[0.0, 0.4, 0.7, 1.0, 1.5, 0.9],
        top_k=[0, 0, 4, 0, 5, 3], top_p=[1.0, 0.9, 1.0, 0.8, 0.7, 1.0], min_p=[0.0, 0.0, 0.1, 0.0, 0.05, 0.2],
        seed=[5, 5, 6, 7, -8, 9], positions=[0, 17, 2**33, 4, 5, 6],
    )  # fmt: skip
    return dict(zip(NAMES, args, strict=True))


# ---------------------------------------------------------------- batches and padding


@layouts
def test_rows_do_not_depend_on_their_batch(sparse: bool) -> None:
    args = batch(sparse)
    whole = op(*args.values())
    assert whole[1].tolist()[3] == 0 and whole[2].tolist()[3] == -1 and whole[1].max() > 2
    for order in ([5, 4, 3, 2, 1, 0], [2], [4, 4, 0], []):
        part = op(*(t[order] if isinstance(t, Tensor) else t for t in args.values()))
        assert_same(part, tuple(t[order] for t in whole))


@layouts
def test_threads_do_not_change_what_comes_out(sparse: bool) -> None:
    """Enough rows and tokens for four threads to be worth their start."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(16, 3, 40_000, generator=generator) * 4
    q = (logits + torch.randn(logits.shape, generator=generator)).softmax(-1)
    tokens, parents = draw_tree(q, [-1, 0, 0], False, generator)
    args = op_arguments(logits, *(to_sparse(q, 30) if sparse else (q, None)), False, tokens, parents)
    expected, before = op(*args), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert all(torch.equal(a, e) for a, e in zip(op(*args), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@layouts
def test_padding_and_the_q_of_leaves_are_never_read(sparse: bool) -> None:
    args = batch(sparse)
    expected = op(*args.values())
    padding = torch.arange(9) >= args["num_nodes"].unsqueeze(1)
    leaf = torch.ones(6, 9, dtype=torch.bool)
    for b, n in enumerate(args["num_nodes"].tolist()):
        leaf[b, args["parents"][b, 1:n].long()] = False
    args["tokens"] = args["tokens"].masked_fill(padding, 2**62)
    args["parents"] = args["parents"].masked_fill(padding, -7)
    args["logits"] = args["logits"].masked_fill(padding.unsqueeze(-1), math.nan)
    args["draft_probs"] = args["draft_probs"].masked_fill(leaf.unsqueeze(-1), math.nan)
    if sparse:
        args["draft_ids"] = args["draft_ids"].masked_fill(leaf.unsqueeze(-1), 2**62)
    assert_same(op(*args.values()), expected)
    args["parents"] = args["parents"].masked_fill(padding, 0)  # would be children of the root
    args["tokens"] = torch.where(padding, torch.arange(9) % 3, args["tokens"])
    assert_same(op(*args.values()), expected)


def test_integer_seeds_count_up_along_the_batch() -> None:
    logits, q = torch.zeros(3, 2, 50), torch.ones(3, 2, 50)
    tree = TokenTree.from_chains([0] * 3, [[1], [2], [3]])
    counted = verify_tree_rejection(logits, tree, q, seed=2**64 - 1)
    given = verify_tree_rejection(logits, tree, q, seed=torch.tensor([-1, 0, 1]))
    assert torch.equal(counted.next_token, given.next_token)
    assert len(set(counted.next_token.tolist())) > 1


@pytest.mark.parametrize(("B", "N", "k"), [(0, 0, 4), (0, 3, 4), (2, 0, 4), (2, 3, 4), (2, 3, 0)])
def test_empty_trees(B: int, N: int, k: int) -> None:
    tree = TokenTree(torch.zeros(B, N).long(), torch.full((B, N), -1).int(), torch.zeros(B).int())
    for q, ids in ((torch.zeros(B, N, 5), None), (torch.zeros(B, N, k), torch.zeros(B, N, k).long())):
        accepted = verify_tree_rejection(torch.zeros(B, N, 5), tree, q, draft_ids=ids)
        assert (accepted.path == -1).all() and accepted.path.shape == (B, N)
        assert accepted.length.tolist() == [0] * B and accepted.next_token.tolist() == [-1] * B


@pytest.mark.parametrize("far", ["logits", "draft_probs"])
def test_offsets_past_32_bits(far: str) -> None:
    """Rows 2**31 elements apart; only the pages that are touched take memory."""
    try:
        base = torch.empty(2**31 + 2**31 + 100, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space for 2**32 elements: {error}")
    wide = base.as_strided((1, 3, 100), (2**31, 2**31, 1))
    logits = torch.full((1, 3, 100), -100.0, dtype=torch.bfloat16)
    logits[0, 0, 7] = logits[0, 1, 42] = logits[0, 2, 99] = 0.0
    q = torch.zeros(1, 3, 100, dtype=torch.bfloat16)
    q[..., 7], q[..., 42] = 0.5, 0.5
    wide.copy_(logits if far == "logits" else q)
    args = (wide, q) if far == "logits" else (logits, wide)
    accepted = verify_tree_rejection(args[0], TokenTree.from_chains([0], [[7, 42]]), args[1])
    assert accepted.length.item() == 3 and accepted.next_token.item() == 99


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(6, 9, 11, dtype=torch.int64)}, "logits must be .* torch.int64"),
        ({"logits": torch.zeros(6, 9)}, r"logits must be \[B, N, V\]"),
        ({"logits": torch.zeros(6, 1025, 2)}, "at most 1024 nodes.*1025"),
        ({"tokens": torch.zeros(6, 9, dtype=torch.int32)}, "tokens must be .*int64.*int32"),
        ({"num_nodes": torch.full((6,), 10, dtype=torch.int32)}, "num_nodes must lie between.*10"),
        ({"temperature": torch.tensor([-1.0] * 6)}, "temperature must be finite and not negative, got -1"),
        ({"top_p": torch.zeros(6)}, r"top_p must lie in \(0, 1\], got 0"),
        (
            {"draft_probs": torch.zeros(6, 9, 10)},
            r"\[6, 9, 11\] \(without draft_ids\), got \[6, 9, 10\]",
        ),
        ({"draft_probs": torch.zeros(6, 8, 11)}, r"draft_probs must be \[6, 9, 11\].*\[6, 8, 11\]"),
        ({"draft_probs": torch.zeros(6, 11)}, r"draft_probs must be \[6, 9, 11\]"),
        ({"draft_probs": torch.zeros(6, 9, 11, dtype=torch.int32)}, "draft_probs must be .*int32"),
        ({"draft_probs": torch.zeros(6, 9, 11, device="meta")}, "draft_probs must be .* on cpu.*meta"),
        (
            {"draft_ids": torch.zeros(6, 9, 5, dtype=torch.int64)},
            r"draft_ids .*\[6, 9, 11\].*\[6, 9, 5\]",
        ),
        ({"draft_ids": torch.zeros(6, 9, 11, dtype=torch.int32)}, "draft_ids must be .*int64.*int32"),
    ],
)
@pytest.mark.parametrize("implementation", ["dispatched", "reference"])
def test_wrong_tensors_are_named(changes: dict[str, Tensor], message: str, implementation: str) -> None:
    with pytest.raises(ValueError, match=message):
        (op if implementation == "dispatched" else _reference)(*(batch() | changes).values())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"temperature": torch.ones(3)}, r"temperature must be a number or \[2\], got \[3\]"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0"),
        ({"top_k": -1}, "top_k must not be negative, got -1"),
        ({"seed": 1.5}, "seed must be a number or a tensor, got 1.5"),
    ],
)
def test_per_row_arguments_are_checked_by_name(argument: dict, message: str) -> None:
    tree = TokenTree.from_parents([[0]] * 2, [[-1]] * 2)
    with pytest.raises(ValueError, match=message):
        verify_tree_rejection(torch.zeros(2, 1, 5), tree, torch.zeros(2, 1, 5), **argument)


# ---------------------------------------------------------------- registration


@pytest.mark.skipif(native.cpu is None, reason="the C++ module is not built")
def test_a_cpu_call_reaches_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Spy:
        def verify_tree_rejection(self, *args: object) -> None:
            calls.append(args)

    monkeypatch.setattr(native, "cpu", Spy())
    op(*batch().values())
    assert len(calls) == 1


@layouts
def test_opcheck(sparse: bool) -> None:
    # NaN, which opcheck does not compare, is in no output: every row has a distribution.
    torch.library.opcheck(op, tuple(batch(sparse).values()))


@layouts
@replacement
def test_compiled_equals_eager(sparse: bool, with_replacement: bool) -> None:
    """The public function inside a full graph, followed by arithmetic on what it returns."""
    args = batch(sparse)
    tree = TokenTree(args["tokens"], args["parents"], args["num_nodes"])

    def step(logits: Tensor, q: Tensor, tree: TokenTree) -> tuple[Tensor, ...]:
        accepted = verify_tree_rejection(
            logits * 2, tree, q, draft_ids=args["draft_ids"], with_replacement=with_replacement, seed=11,
            temperature=0.9, top_k=7, positions=args["positions"],
        )  # fmt: skip
        return accepted.path, accepted.length + 1, accepted.next_token, accepted.logprobs.exp()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = (args["logits"], args["draft_probs"], tree)
    assert_same(compiled(*inputs), step(*inputs))


def test_inputs_that_require_grad_and_float64_are_taken_as_they_are() -> None:
    logits = torch.zeros(1, 2, 3, dtype=torch.float64, requires_grad=True)
    accepted = verify_tree_rejection(logits, TokenTree.from_chains([0], [[1]]), logits.softmax(-1))
    assert not accepted.logprobs.requires_grad and accepted.length.item() == 2


# ---------------------------------------------------------------- on a GPU


def on_gpu(args: tuple) -> tuple:
    return tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("V", [1, 5, 63, 1000, 32003, 262144])
@pytest.mark.parametrize("rule", [{"temperature": 0.0}, SAMPLED, FILTERED, {**SAMPLED, "top_p": 0.9}])
@layouts
def test_cuda_equals_cpu(dtype: torch.dtype, V: int, rule: dict[str, float], sparse: bool) -> None:
    generator = torch.Generator().manual_seed(V)
    B, N = 8, 13
    logits = (torch.randn(B, N, V, generator=generator) * 3).to(dtype)
    q = (logits.float() + torch.randn(B, N, V, generator=generator)).softmax(-1)
    tokens, parents = random_tree(generator, B, N, V)
    tokens[:, 1:] = q.flatten(0, 1).multinomial(1, generator=generator).reshape(B, N)[:, 1:]
    num_nodes = torch.tensor([13, 0, 1, 5, 13, 12, 7, 13], dtype=torch.int32)
    drafts = to_sparse(q, 50) if sparse else (q, None)
    for with_replacement in WITH.values():
        args = op_arguments(
            logits, drafts[0].to(dtype), drafts[1], with_replacement, tokens, parents, num_nodes,
            positions=2**33, **rule,
        )  # fmt: skip
        assert_same(op(*on_gpu(args)), op(*args), atol=1e-4)


@pytest.mark.gpu
def test_cuda_reports_rows_without_a_distribution() -> None:
    tree = TokenTree.from_chains([0], [[1]])
    on_device = TokenTree(*(t.cuda() for t in tree[:3]))
    for bad in (math.nan, -math.inf, math.inf):
        logits = torch.zeros(1, 2, 1000)
        logits[0, 0, 500] = bad
        logits[0, 0] = bad if bad == -math.inf else logits[0, 0]
        accepted = verify_tree_rejection(logits.cuda(), on_device, torch.ones(1, 2, 1000, device="cuda"))
        assert accepted.next_token.item() == -1 and accepted.logprobs[0, 0].isnan()
    for bad in (math.nan, -1.0, math.inf):
        q = torch.ones(1, 2, 1000)
        q[0, 0, 500] = bad
        accepted = verify_tree_rejection(torch.zeros(1, 2, 1000, device="cuda"), on_device, q.cuda())
        assert accepted.next_token.item() == -1 and accepted.logprobs[0, 0].isnan()


@pytest.mark.gpu
def test_cuda_offsets_past_32_bits() -> None:
    """B * N * V > 2**31 elements of p and of q: the last rows are read where they lie."""
    V = 2**24
    logits = torch.full((2, 70, V), -100.0, dtype=torch.bfloat16, device="cuda")
    logits[:, :69, 5], logits[1, 69, 12345], logits[0, 69, 0] = 0.0, 0.0, 0.0
    q = torch.zeros(2, 70, V, dtype=torch.bfloat16, device="cuda")
    q[..., 5] = 1.0
    tree = TokenTree.from_chains([0, 0], [[5] * 69] * 2)
    accepted = verify_tree_rejection(logits, TokenTree(*(t.cuda() for t in tree[:3])), q)
    assert accepted.length.tolist() == [70, 70] and accepted.next_token.tolist() == [0, 12345]


@pytest.mark.gpu
def test_cuda_graph_replays_with_new_inputs() -> None:
    """Captured once, replayed on other logits: what eager gives."""
    args = list(on_gpu(tuple(batch().values())))
    op(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = op(*args)
    args[0].copy_(args[0].flip(0))
    graph.replay()
    assert_same(outputs, op(*args))
