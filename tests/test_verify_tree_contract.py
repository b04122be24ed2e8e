"""``verify_tree``: what its rows may depend on, what it refuses, and how it is registered."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor
from verify_tree_cases import FILTERED, SAMPLED, arguments, assert_same, chain, emitted, leaning, random_tree

from specfuse.kernels.verify_tree_ref import verify_tree_ref
from specfuse.ops import implementations, native, self_test, verify_tree
from specfuse.tree import TokenTree

op = torch.ops.specfuse.verify_tree.default


# ---------------------------------------------------------------- batches, padding, invariance


def _batch(V: int = 11, B: int = 6, N: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    tokens, parents = random_tree(generator, B, N, V)
    logits = torch.randn(B, N, V, generator=generator)
    temperature = torch.tensor([0.0, 0.4, 0.7, 1.0, 1.5, 0.9])
    args = arguments(
        logits, tokens, parents, torch.tensor([9, 5, 1, 0, 9, 7], dtype=torch.int32), temperature=temperature,
        top_k=[0, 0, 4, 0, 5, 3], top_p=[1.0, 0.9, 1.0, 0.8, 0.7, 1.0], min_p=[0.0, 0.0, 0.1, 0.0, 0.05, 0.2],
        seed=[5, 5, 6, 7, -8, 9], positions=[0, 17, 2**33, 4, 5, 6],
    )  # fmt: skip
    names = [
        "logits",
        "tokens",
        "parents",
        "num_nodes",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "positions",
    ]
    return dict(zip(names, args, strict=True))


def test_rows_do_not_depend_on_their_batch() -> None:
    batch = _batch()
    whole = op(*batch.values())
    assert whole[1].tolist()[3] == 0 and whole[2].tolist()[3] == -1 and (whole[0][3] == -1).all()
    for order in ([5, 4, 3, 2, 1, 0], [2], [4, 4, 0], []):
        part = op(*(t[order] for t in batch.values()))
        assert_same(part, tuple(t[order] for t in whole))


def test_padding_is_never_read() -> None:
    """Garbage after num_nodes, in tokens, parents and logits, changes nothing."""
    batch = _batch()
    expected = op(*batch.values())
    padding = torch.arange(9) >= batch["num_nodes"].unsqueeze(1)
    batch["tokens"] = batch["tokens"].masked_fill(padding, 2**62)
    batch["parents"] = batch["parents"].masked_fill(padding, -7)
    batch["logits"] = batch["logits"].masked_fill(padding.unsqueeze(-1), math.nan)
    assert_same(op(*batch.values()), expected)
    batch["parents"] = batch["parents"].masked_fill(padding, 0)  # would be children of the root
    batch["tokens"] = torch.where(padding, torch.arange(9) % 3, batch["tokens"])
    assert_same(op(*batch.values()), expected)


@pytest.mark.parametrize(
    "rule", [{"temperature": 0.0}, SAMPLED, FILTERED], ids=["greedy", "sampled", "filtered"]
)
def test_drafts_do_not_change_what_is_emitted(rule: dict[str, float]) -> None:
    """With a toy language model, any tree emits a prefix of what decoding token by token emits."""
    V, rows = 3, 40
    model = torch.randn(V, V, generator=torch.Generator().manual_seed(5))  # next-token logits by last token
    plain = torch.zeros(rows, 8, dtype=torch.int64)
    root = torch.full((rows, 1), -1, dtype=torch.int32)
    for step in range(7):
        logits = model[plain[:, step : step + 1]]
        args = arguments(logits, plain[:, step : step + 1], root, positions=step + 100, **rule)
        plain[:, step + 1] = op(*args)[2]
    deepest = 0
    for seed in range(10):
        tokens, parents = random_tree(torch.Generator().manual_seed(seed), rows, 12, V)
        tokens[:, 0] = 0
        args = arguments(model[tokens], tokens, parents, positions=100, **rule)
        for b, got in enumerate(emitted(op(*args), tokens)):
            got = got[:7]
            assert got == plain[b, 1 : 1 + len(got)].tolist()
            deepest = max(deepest, len(got))
    assert deepest >= 3


def test_integer_seeds_count_up_along_the_batch() -> None:
    logits = torch.zeros(3, 1, 50)
    tree = TokenTree.from_parents([[0]] * 3, [[-1]] * 3)
    counted = verify_tree(logits, tree, temperature=1.0, seed=2**64 - 1)
    given = verify_tree(logits, tree, temperature=1.0, seed=torch.tensor([-1, 0, 1]))
    assert torch.equal(counted.next_token, given.next_token)
    assert len(set(counted.next_token.tolist())) > 1


def test_the_lowest_of_duplicate_siblings_is_taken() -> None:
    logits = leaning([1, 2, 2], 4).unsqueeze(0)
    args = arguments(logits, torch.tensor([[0, 1, 1]]), torch.tensor([[-1, 0, 0]], dtype=torch.int32))
    assert op(*args)[0].tolist() == [[0, 1, -1]]


@pytest.mark.parametrize("N", [1023, 1024])
def test_the_widest_trees(N: int) -> None:
    tokens = torch.arange(N) % 7
    logits = leaning([*tokens[1:].tolist(), 3], 7)
    accepted = verify_tree(*chain(tokens.tolist(), logits))
    assert accepted.length.item() == N and accepted.next_token.item() == 3
    assert accepted.path.tolist() == [list(range(N))]


@pytest.mark.parametrize(("B", "N"), [(0, 0), (0, 3), (2, 0), (2, 3)])
def test_empty_trees(B: int, N: int) -> None:
    """Rows without nodes emit nothing, whatever the width."""
    tree = TokenTree(torch.zeros(B, N).long(), torch.full((B, N), -1).int(), torch.zeros(B).int())
    accepted = verify_tree(torch.zeros(B, N, 5), tree)
    assert accepted.path.shape == accepted.logprobs.shape == (B, N)
    assert (accepted.path == -1).all() and (accepted.logprobs == 0).all()
    assert accepted.length.tolist() == [0] * B and accepted.next_token.tolist() == [-1] * B


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_offsets_past_32_bits(dtype: torch.dtype) -> None:
    """Rows 2**31 elements apart; only the pages that are touched take memory."""
    try:
        base = torch.empty(2**31 + 100, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space for 2**31 elements: {error}")
    logits = base.as_strided((1, 2, 100), (2**31 + 100, 2**31, 1))
    logits.zero_()
    logits[0, 0, 7], logits[0, 1, 99] = 1.0, 1.0
    accepted = verify_tree(logits, TokenTree.from_chains([0], [[7]]))
    assert accepted.length.item() == 2 and accepted.next_token.item() == 99


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e-50),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
    ],
)
@pytest.mark.parametrize("given_as", ["number", "tensor"])
def test_values_out_of_range_are_named(argument: str, value: float, given_as: str) -> None:
    if given_as == "tensor" and value == 1e-50:
        pytest.skip("a float32 tensor holds 0 already")
    rule = {"temperature": 1.0, argument: value if given_as == "number" else torch.tensor([0.5, value])}
    with pytest.raises(ValueError, match=rf"{argument} must .*{'nan' if value != value else f'{value:g}'}"):
        verify_tree(torch.zeros(2, 1, 4), TokenTree.from_parents([[0]] * 2, [[-1]] * 2), **rule)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(6, 9, 11, dtype=torch.int64)}, "logits must be .* torch.int64"),
        ({"logits": torch.zeros(6, 9)}, r"logits must be \[B, N, V\]"),
        ({"logits": torch.zeros(6, 9, 0)}, "logits must have"),
        ({"logits": torch.zeros(6, 1025, 2)}, "at most 1024 nodes.*1025"),
        ({"logits": torch.zeros(6, 8, 11)}, r"tokens must be \[6, 8\]"),
        ({"tokens": torch.zeros(6, 9, dtype=torch.int32)}, "tokens must be .*int64.*int32"),
        ({"parents": torch.zeros(6, 9, dtype=torch.int64)}, "parents must be .*int32.*int64"),
        ({"parents": torch.zeros(6, 9, dtype=torch.int32, device="meta")}, "parents must be .* on cpu.*meta"),
        ({"num_nodes": torch.full((6,), 10, dtype=torch.int32)}, "num_nodes must lie between.*10"),
        ({"num_nodes": torch.full((6,), -1, dtype=torch.int32)}, "num_nodes must lie between.*-1"),
        ({"num_nodes": torch.ones(5, dtype=torch.int32)}, r"num_nodes must be \[6\]"),
        ({"temperature": torch.tensor([-1.0] * 6)}, "temperature must be finite and not negative, got -1"),
        ({"top_p": torch.zeros(6)}, r"top_p must lie in \(0, 1\], got 0"),
        ({"seed": torch.zeros(6)}, "seed must be .*int64.*float32"),
    ],
)
@pytest.mark.parametrize("implementation", ["dispatched", "reference"])
def test_wrong_tensors_are_named(changes: dict[str, Tensor], message: str, implementation: str) -> None:
    from specfuse.ops.verify_tree import _reference

    with pytest.raises(ValueError, match=message):
        (op if implementation == "dispatched" else _reference)(*(_batch() | changes).values())


# ---------------------------------------------------------------- registration


def test_the_dispatcher_uses_the_native_code() -> None:
    """Where C++ is built it is what runs: a call that leaves the reference no chance to be the one."""
    expected = "C++" if native.cpu is not None else "eager reference"
    chosen = implementations()
    assert {chosen[op]["cpu"] for op in ("verify_tree", "compact_kv")} == {expected}


def test_every_op_passes_its_self_test() -> None:
    assert self_test() == dict.fromkeys(implementations(), "ok")


@pytest.mark.skipif(native.cpu is None, reason="the C++ module is not built")
def test_a_cpu_call_reaches_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Spy:
        def verify_tree(self, *args: object) -> None:
            calls.append(args)

    monkeypatch.setattr(native, "cpu", Spy())
    op(*_batch().values())
    assert len(calls) == 1


def test_the_self_test_notices_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["specfuse.ops.self_tests"]
    other_seeds = lambda *args: verify_tree_ref(*args[:8], args[8] + 1, args[9])  # noqa: E731
    monkeypatch.setattr(module, "verify_tree_ref", other_seeds)
    monkeypatch.setattr(module, "compact_kv_ref", lambda *args: None)
    for op in ("verify_tree", "compact_kv"):
        assert "cpu: differs from the eager reference" in self_test()[op]


@pytest.mark.parametrize("rule", [{"temperature": 0.0}, FILTERED], ids=["greedy", "filtered"])
def test_opcheck(rule: dict[str, float]) -> None:
    batch = _batch()
    args = arguments(*(batch[name] for name in ("logits", "tokens", "parents", "num_nodes")), **rule)
    torch.library.opcheck(op, args)


@pytest.mark.parametrize(
    "rule", [{"temperature": 0.0}, SAMPLED, FILTERED], ids=["greedy", "sampled", "filtered"]
)
def test_compiled_equals_eager(rule: dict[str, float]) -> None:
    """The public function inside a full graph, followed by arithmetic on what it returns."""
    batch = _batch()
    tree = TokenTree(batch["tokens"], batch["parents"], batch["num_nodes"])

    def step(logits: Tensor, tree: TokenTree) -> tuple[Tensor, ...]:
        accepted = verify_tree(logits * 2, tree, seed=11, positions=batch["positions"], **rule)
        return accepted.path, accepted.length + 1, accepted.next_token, accepted.logprobs.exp()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same(compiled(batch["logits"], tree), step(batch["logits"], tree))


def test_logits_that_require_grad_are_taken_as_they_are() -> None:
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    accepted = verify_tree(logits, TokenTree.from_parents([[0]], [[-1]]))
    assert not accepted.logprobs.requires_grad


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("V", [1, 5, 63, 1000, 32003])
@pytest.mark.parametrize("rule", [{"temperature": 0.0}, SAMPLED, FILTERED, {**SAMPLED, "top_p": 0.9}])
def test_cuda_equals_cpu(dtype: torch.dtype, V: int, rule: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(V)
    B, N = 8, 13
    tokens, parents = random_tree(generator, B, N, V)
    logits = (torch.randn(B, N, V, generator=generator) * 3).to(dtype)
    num_nodes = torch.tensor([13, 0, 1, 5, 13, 12, 7, 13], dtype=torch.int32)
    args = arguments(logits, tokens, parents, num_nodes, positions=2**33, **rule)
    assert_same(op(*(t.cuda() for t in args)), op(*args), atol=1e-4)


@pytest.mark.gpu
def test_cuda_reports_rows_without_a_distribution() -> None:
    for rule in ({"temperature": 0.0}, SAMPLED, FILTERED):
        for bad in (math.nan, -math.inf):
            logits = leaning([1, 1], 100)
            logits[1] = bad
            logits, tree = chain([0, 1], logits)
            accepted = verify_tree(logits.cuda(), TokenTree(*(t.cuda() for t in tree[:3])), **rule)
            if accepted.length.item() == 2:
                assert accepted.next_token.item() == -1 and accepted.logprobs[0, 1].isnan()


@pytest.mark.gpu
def test_cuda_offsets_past_32_bits() -> None:
    """B * N * V > 2**31 elements: the last row is read where it lies."""
    logits = torch.zeros(2, 70, 2**24, dtype=torch.bfloat16, device="cuda")
    logits[1, 69, 12345] = 1.0
    logits[:, :69, 5] = 1.0
    tree = TokenTree.from_chains([0, 0], [[5] * 69] * 2)
    accepted = verify_tree(logits, TokenTree(*(t.cuda() for t in tree[:3])))
    assert accepted.length.tolist() == [70, 70] and accepted.next_token.tolist() == [0, 12345]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"temperature": torch.ones(3)}, r"temperature must be a number or \[2\], got \[3\]"),
        ({"positions": torch.zeros(2, 1, dtype=torch.int64)}, r"positions must be a number or \[2\]"),
        ({"temperature": [1.0, 1.0]}, "temperature must be a number or a tensor"),
        ({"top_k": 2.5}, "top_k must be a number or a tensor, got 2.5"),
    ],
)
def test_per_row_arguments_are_checked_by_name(argument: dict, message: str) -> None:
    tree = TokenTree.from_parents([[0]] * 2, [[-1]] * 2)
    with pytest.raises(ValueError, match=message):
        verify_tree(torch.zeros(2, 1, 5), tree, **argument)


def test_a_huge_top_k_keeps_everything() -> None:
    logits, tree = torch.randn(4, 1, 50), TokenTree.from_parents([[0]] * 4, [[-1]] * 4)
    plain = verify_tree(logits, tree, temperature=1.0, seed=3)
    huge = verify_tree(logits, tree, temperature=1.0, seed=3, top_k=torch.tensor(2**40))
    assert torch.equal(plain.next_token, huge.next_token)
