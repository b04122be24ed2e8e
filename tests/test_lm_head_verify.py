"""Contract of ``lm_head_verify``: opt-in, arguments, the paths of ``verify_tree`` on the head's logits."""

from __future__ import annotations

import pytest
import torch
from lm_head_cases import RULES, eighths, expected_paths, lm_head_arguments
from torch import Tensor
from verify_tree_cases import assert_same

import specfuse
from specfuse.ops import verify_tree
from specfuse.ops.lm_head_verify import lm_head_verify
from specfuse.tree import TokenTree

op = torch.ops.specfuse.lm_head_verify.default
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def called(*sizes: int, dtype: torch.dtype, rule: list[float], **options: object) -> tuple:
    """The public function's hidden states, weight and tree, and its keywords."""
    hidden, weight, bias, tokens, parents, num_nodes, *rows = lm_head_arguments(
        *sizes, dtype, rule, **options
    )
    keywords = dict(zip(("temperature", "seed", "positions"), rows, strict=True), bias=bias)
    return (hidden, weight, TokenTree(tokens, parents, num_nodes)), keywords


@dtypes
@rules
def test_equals_verify_tree_on_the_logits(dtype: torch.dtype, rule: list[float]) -> None:
    (hidden, weight, tree), keywords = called(3, 12, 40, 90, dtype=dtype, rule=rule, bias=True)
    actual = lm_head_verify(hidden, weight, tree, **keywords, experimental=True)
    logits = torch.nn.functional.linear(hidden, weight, keywords.pop("bias"))
    assert_same(actual, verify_tree(logits, tree, **keywords))
    assert int(actual.length.max()) > 2  # the walks descend


def test_numbers_stand_for_every_row() -> None:
    (hidden, weight, tree), _ = called(3, 12, 40, 90, dtype=torch.float32, rule=[0.7])
    actual = lm_head_verify(hidden, weight, tree, temperature=0.7, seed=5, positions=3, experimental=True)
    logits = torch.nn.functional.linear(hidden, weight)
    assert_same(actual, verify_tree(logits, tree, temperature=0.7, seed=5, positions=3))


def test_nobody_uses_it_unawares(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, keywords = called(1, 3, 8, 9, dtype=torch.float32, rule=[0.0])
    monkeypatch.delenv("SPECFUSE_EXPERIMENTAL", raising=False)
    with pytest.raises(RuntimeError, match=r"prototype.*experimental=True.*verify_tree"):
        lm_head_verify(*arguments, **keywords)
    monkeypatch.setenv("SPECFUSE_EXPERIMENTAL", "1")
    assert int(lm_head_verify(*arguments, **keywords).length) >= 1
    assert not hasattr(specfuse, "lm_head_verify") and "lm_head_verify" not in dir(specfuse)


@pytest.mark.parametrize(
    "filters", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": torch.tensor([0])}], ids=str
)
def test_filters_are_refused(filters: dict[str, object]) -> None:
    arguments, keywords = called(1, 3, 8, 9, dtype=torch.float32, rule=[1.0])
    with pytest.raises(ValueError, match=f"{next(iter(filters))} must be .*off.*verify_tree"):
        lm_head_verify(*arguments, **keywords, **filters, experimental=True)


NAMES = ("hidden", "weight", "bias", "tokens", "parents", "num_nodes", "temperature", "seed", "positions")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hidden", lambda t: t[0], r"hidden must be \[B, N, D\]"),
        ("hidden", lambda t: t.double(), "hidden must be .*float64"),
        ("hidden", lambda t: t.repeat(1, 400, 1), "hidden must be .* at most 1024 nodes"),
        ("weight", lambda t: t[:, :-1], r"weight must be \[V, 8\].*\[9, 7\]"),
        ("weight", lambda t: t[:0], "weight must be .*1 <= V"),
        ("weight", lambda t: t.half(), r"weight must be .*float32.*float16"),
        ("bias", lambda t: t[:-1], r"bias must be \[9\].*\[8\]"),
        ("tokens", lambda t: t.int(), r"tokens must be \[1, 3\] torch.int64.*int32"),
        ("parents", lambda t: t[:, :-1], r"parents must be \[1, 3\]"),
        ("num_nodes", lambda t: t + 9, "num_nodes must lie between 0 and the tree's width 3, got 12"),
        ("temperature", lambda t: t - 1.0, "temperature must be .*not negative, got -1"),
        ("seed", lambda t: t.float(), r"seed must be \[1\] torch.int64"),
        ("positions", lambda t: t.to("meta"), "positions must be .* on cpu.*meta"),
    ],
)
def test_bad_arguments_are_named(name: str, change: object, message: str) -> None:
    arguments = list(lm_head_arguments(1, 3, 8, 9, torch.float32, bias=True))
    arguments[NAMES.index(name)] = change(arguments[NAMES.index(name)])
    with pytest.raises(ValueError, match=message):
        op(*arguments)


@pytest.mark.parametrize(("B", "N"), [(0, 3), (2, 0)])
def test_empty_batches_and_trees(B: int, N: int) -> None:
    path, length, next_token, logprobs = op(*lm_head_arguments(B, N, 8, 9, torch.float32))
    assert path.shape == logprobs.shape == (B, N)
    assert length.tolist() == [0] * B and next_token.tolist() == [-1] * B


@dtypes
@rules
def test_the_reference_rounds_logits_once(dtype: torch.dtype, rule: list[float]) -> None:
    arguments = lm_head_arguments(3, 9, 33, 70, dtype, rule)
    assert_same(op(*arguments), expected_paths(arguments))


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias: bool) -> None:
    torch.library.opcheck(op, lm_head_arguments(2, 5, 8, 9, torch.float32, [0.0, 1.0], bias=bias))


def test_compiled_equals_eager() -> None:
    (hidden, weight, tree), keywords = called(2, 6, 16, 30, dtype=torch.float32, rule=[0.0, 0.9])

    def step(hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(lm_head_verify(hidden * 0.5, weight, tree, **keywords, experimental=True))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same(compiled(hidden), step(hidden))


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@dtypes
@rules
@pytest.mark.parametrize(
    ("B", "N", "D", "V"), [(1, 16, 4096, 32000), (2, 61, 1024, 32003), (9, 37, 200, 997)]
)
def test_cuda_equals_the_reference(
    dtype: torch.dtype, rule: list[float], B: int, N: int, D: int, V: int
) -> None:
    arguments = lm_head_arguments(B, N, D, V, dtype, rule, bias=True, device="cuda")
    assert_same(op(*arguments), expected_paths(arguments), atol=1e-4)


@pytest.mark.gpu
def test_cuda_weights_past_2_to_the_31() -> None:
    V, D = 2**18, 2**13 + 16
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(V, D, dtype=torch.bfloat16, device="cuda")
    hidden = eighths(generator, 1, 1, D).to("cuda", torch.bfloat16)
    weight[-2] = hidden[0, 0].sign()
    tree = TokenTree.from_chains([0], [[]]).to("cuda")
    accepted = lm_head_verify(hidden, weight, tree, experimental=True)
    assert int(accepted.next_token) == V - 2


@pytest.mark.gpu
def test_cuda_graph_and_repeats_are_bit_equal() -> None:
    arguments = lm_head_arguments(2, 33, 512, 5000, torch.bfloat16, [0.0, 0.8], device="cuda")
    first = op(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = op(*arguments)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(first, replayed, strict=True))
