"""verify_tree against eager PyTorch and torch.compile, on the CPU or on CUDA.

    python benchmarks/bench_verify_tree.py [--device cuda] [--no-compile] [--json]
    pytest benchmarks/bench_verify_tree.py          # the same calls under pytest-benchmark

`eager` is what one writes without the op: argmax (plus Gumbel noise and sorted filters) over all N rows, then
a vectorised walk of the tree's depth. `compile` is torch.compile of it. Both are compared with the op first,
on the op's own noise. The trees are 4 levels deep and the walk accepts two drafts, so that `specfuse` reads
three of the N rows: `bytes` counts those, `floor_us` is one read of them at --bandwidth (GB/s).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from timing import Calls, interleaved_us, parser, report
from torch import Tensor

from specfuse.kernels.philox_ref import gumbel
from specfuse.ops import verify_tree
from specfuse.tree import TokenTree

RULES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "top-k 50": {"temperature": 1.0, "top_k": 50},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
}
SHAPES = [(1, 1, 32000), (1, 16, 32000), (1, 64, 32000), (4, 32, 32000), (1, 32, 151936)]
DEPTH, ACCEPTED, SEED = 4, 2, 7


def case(B: int, N: int, V: int, device: str, dtype: torch.dtype) -> tuple[Tensor, TokenTree]:
    """Logits as spread as real ones, and trees whose first chain the target follows for two drafts."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, N, V, generator=generator) * 2.5
    parents = torch.tensor([-1, *[0 if i % DEPTH == 1 or DEPTH == 1 else i - 1 for i in range(1, N)]])
    tokens = torch.arange(N) + 5
    for node in range(min(ACCEPTED, N - 1)):
        logits[:, node, tokens[node + 1]] = 60.0
    tree = TokenTree(
        tokens.expand(B, N).contiguous().to(device),
        parents.int().expand(B, N).contiguous().to(device),
        torch.full((B,), N, dtype=torch.int32, device=device),
    )
    return logits.to(device, dtype), tree


def random_noise(logits: Tensor) -> Tensor:
    return -torch.empty_like(logits).exponential_().log()


def philox_noise(logits: Tensor, tree: TokenTree) -> Tensor:
    """The op's own noise for every node, [B, N, V]: for comparing results."""
    B, N, V = logits.shape
    position = torch.ones(B, N, dtype=torch.int64)
    for i in range(1, N):
        position[:, i] = position[:, tree.parents[0, i]] + 1
    seed = (torch.arange(B) + SEED).view(B, 1, 1).expand(B, N, V)
    token = torch.arange(V).expand(B, N, V)
    return gumbel(seed, position.unsqueeze(-1).expand(B, N, V), token).float().to(logits.device)


def eager(
    logits: Tensor,
    tree: TokenTree,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    noise: Callable[[Tensor], Tensor] = random_noise,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All rows at once, then the walk: path [B, DEPTH + 1], length, next_token, logprobs."""
    z = logits.float()
    if temperature > 0.0:
        z = z / temperature
        if top_k:
            z = z.masked_fill(z < z.topk(top_k).values[..., -1:], -math.inf)
        if top_p < 1.0:
            ordered, ids = z.sort(dim=-1, descending=True)
            probs = ordered.softmax(-1)
            dropped = probs.cumsum(-1) - probs >= top_p
            z = z.masked_fill(torch.zeros_like(dropped).scatter(-1, ids, dropped), -math.inf)
        choice = (z + noise(z)).argmax(-1)
    else:
        choice = z.argmax(-1)
    logprob = z.log_softmax(-1).gather(-1, choice.unsqueeze(-1)).squeeze(-1)
    node = torch.zeros_like(choice[:, :1])
    alive = torch.ones_like(node, dtype=torch.bool)
    path, length, logprobs = [], torch.zeros_like(node), []
    for _ in range(DEPTH + 1):
        path.append(torch.where(alive, node, -1))
        logprobs.append(torch.where(alive, logprob.gather(1, node), 0.0))
        length = length + alive
        match = (tree.parents == node) & (tree.tokens == choice.gather(1, node))
        alive = alive & match.any(1, keepdim=True)
        node = torch.where(alive, match.int().argmax(1, keepdim=True), node)
    return torch.cat(path, 1), length.squeeze(1), choice.gather(1, node).squeeze(1), torch.cat(logprobs, 1)


def check(logits: Tensor, tree: TokenTree, rule: dict[str, Any]) -> None:
    """The op and the eager code agree on the same noise; raises AssertionError otherwise."""
    noise = philox_noise(logits, tree) if rule["temperature"] else None
    expected = eager(logits, tree, **rule, noise=lambda z: noise)
    actual = verify_tree(logits, tree, **rule, seed=SEED)
    width = min(DEPTH + 1, logits.shape[1])
    assert torch.equal(actual.path[:, :width], expected[0][:, :width].int())
    assert torch.equal(actual.length, expected[1].int()) and torch.equal(actual.next_token, expected[2])
    torch.testing.assert_close(actual.logprobs[:, :width], expected[3][:, :width], atol=1e-3, rtol=1e-3)


def calls(logits: Tensor, tree: TokenTree, rule: dict[str, Any], compiled: bool) -> Calls:
    providers: Calls = {
        "eager": lambda: eager(logits, tree, **rule),
        "specfuse": lambda: verify_tree(logits, tree, **rule, seed=SEED),
    }
    if compiled:
        function = torch.compile(eager, fullgraph=True)
        providers["compile"] = lambda: function(logits, tree, **rule)
    return providers


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--bandwidth", type=float, default=None, help="GB/s, for the floor")
    args = arguments.parse_args()
    cases: list[dict[str, object]] = []
    for B, N, V in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            logits, tree = case(B, N, V, args.device, dtype)
            for name, rule in RULES.items():
                check(logits, tree, rule)
                compiled = not args.no_compile and SHAPES[1] == (B, N, V) and dtype == torch.float32
                times = interleaved_us(calls(logits, tree, rule, compiled), args.device, args.rounds)
                entry: dict[str, object] = {"case": f"B{B}-N{N}-V{V}-{str(dtype)[6:]}-{name}", "times": times}
                visited = B * min(ACCEPTED + 1, N) * V * logits.element_size()
                entry["bytes"] = visited
                if args.bandwidth:
                    entry["floor_us"] = round(visited / args.bandwidth / 1e3, 2)
                cases.append(entry)
    report(cases, args)


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("provider", ["eager", "specfuse"])
    metafunc.parametrize("rule", RULES)


def test_verify_tree(benchmark: Any, provider: str, rule: str) -> None:
    logits, tree = case(1, 16, 32000, "cpu", torch.float32)
    check(logits, tree, RULES[rule])
    benchmark(calls(logits, tree, RULES[rule], compiled=False)[provider])


if __name__ == "__main__":
    main()
