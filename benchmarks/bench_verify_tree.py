"""verify_tree against eager PyTorch and torch.compile, on the CPU or on CUDA.

`eager` is what one writes without the op: argmax (plus Gumbel noise and sorted filters) over all N rows, then
a vectorised walk of the tree's depth. `compile` is torch.compile of it. Both are compared with the op first,
on the op's own noise. `sgl-kernel`, where it imports, is its greedy walk after an argmax, or its target-only
sampling after a softmax: another draw from the same distribution, compared with nothing (untried so far).

The trees are 4 levels deep and the walk accepts two drafts. `bytes` is one read of all logits, what eager
code and a scan of all rows need; where the op reads three visited rows per tree only, it may take less than
that floor. Parameters are tensors, as the generator's step has them: numbers cost a fill each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Case, Tuning, main, parametrize, run_case
from torch import Tensor

from specfuse.kernels.philox_ref import gumbel
from specfuse.ops import verify_tree
from specfuse.tree import TokenTree

try:
    import sgl_kernel
except ImportError:
    sgl_kernel = None

Rule = dict[str, float]
RULES: dict[str, Rule] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "top-k": {"temperature": 1.0, "top_k": 50},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
}
SMALL = [(1, 1, 32000), (1, 16, 32000), (1, 64, 32000), (4, 32, 32000), (1, 32, 151936)]
# B * N <= 256 has a target of 10 us, 64 MB and more one of 80 % of a copy.
LARGE = [(16, 16, 32000), (1, 256, 32000), (32, 32, 32000), (64, 64, 32000), (4, 64, 151936)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEPTH, ACCEPTED, SEED = 4, 2, 7


def problem(B: int, N: int, V: int, device: str, dtype: torch.dtype) -> tuple[Tensor, TokenTree]:
    """Logits as spread as real ones, and trees whose first chain the target follows for two drafts."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(B, N, V, generator=generator, device=device).mul_(2.5).to(dtype)
    parents = torch.tensor([-1, *[0 if i % DEPTH == 1 or DEPTH == 1 else i - 1 for i in range(1, N)]])
    tokens = torch.arange(N) + 5
    for node in range(min(ACCEPTED, N - 1)):
        logits[:, node, tokens[node + 1]] = 60.0
    tree = TokenTree(
        tokens.expand(B, N).contiguous().to(device),
        parents.int().expand(B, N).contiguous().to(device),
        torch.full((B,), N, dtype=torch.int32, device=device),
    )
    return logits, tree


def random_noise(logits: Tensor) -> Tensor:
    return -torch.empty_like(logits).exponential_().log()


def philox_noise(logits: Tensor, tree: TokenTree) -> Tensor:
    """The op's own noise for every node, [B, N, V]: for comparing results."""
    B, N, V = logits.shape
    position = torch.ones(B, N, dtype=torch.int64)
    for i in range(1, N):
        position[:, i] = position[:, tree.parents[0, i]] + 1
    noise = torch.empty(B, N, V, device=logits.device)
    token = torch.arange(V, device=logits.device)
    for b in range(B):  # a batch at a time: int64 intermediates are large
        seed = torch.full((N, V), b + SEED, device=logits.device)
        noise[b] = gumbel(seed, position[b].to(logits.device).unsqueeze(-1).expand(N, V), token.expand(N, V))
    return noise


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


def ours(logits: Tensor, tree: TokenTree, rule: Rule) -> Callable[[], tuple[Tensor, ...]]:
    B, device = logits.shape[0], logits.device
    dtypes = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32}
    defaults: Rule = {"top_k": 0, "top_p": 1.0}
    rows = {
        name: torch.full((B,), value, dtype=dtypes[name], device=device)
        for name, value in {**defaults, **rule}.items()
    }
    rows["min_p"] = torch.zeros(B, device=device)
    rows["seed"] = torch.arange(B, device=device) + SEED
    rows["positions"] = torch.zeros(B, dtype=torch.int64, device=device)
    return functools.partial(verify_tree, logits, tree, **rows)


def check(logits: Tensor, tree: TokenTree, rule: Rule) -> None:
    """The op and the eager code agree on the same noise; raises AssertionError otherwise."""
    noise = philox_noise(logits, tree) if rule["temperature"] else None
    expected = eager(logits, tree, **rule, noise=lambda z: noise)
    actual = ours(logits, tree, rule)()
    width = min(DEPTH + 1, logits.shape[1])
    assert torch.equal(actual[0][:, :width], expected[0][:, :width].int()), "path differs"
    assert torch.equal(actual[1], expected[1].int()) and torch.equal(actual[2], expected[2]), "tokens differ"
    torch.testing.assert_close(actual[3][:, :width], expected[3][:, :width], atol=1e-3, rtol=1e-3)


def sglang(logits: Tensor, tree: TokenTree, rule: Rule) -> Callable[[], object]:
    """SGLang's kernels on the same tree, with what they need before: an argmax, or probabilities."""
    (B, N, _), device = logits.shape, logits.device
    encoded = [t.to(device).contiguous() for t in tree.to("cpu").to_sglang()[:3]]
    predicts = torch.empty(B * N, dtype=torch.int32, device=device)
    accepted = torch.empty(B, DEPTH + 1, dtype=torch.int32, device=device)
    counts = torch.empty(B, dtype=torch.int32, device=device)
    coins = torch.rand(B, N, device=device), torch.rand(B, device=device)

    def greedy() -> None:
        target = logits.argmax(-1)
        sgl_kernel.verify_tree_greedy(predicts, accepted, counts, tree.tokens, *encoded, target)

    def sampled() -> None:
        probs = (logits.float() / rule["temperature"]).softmax(-1)
        sgl_kernel.tree_speculative_sampling_target_only(
            predicts, accepted, counts, tree.tokens, *encoded, *coins, probs, torch.zeros_like(probs)
        )

    return sampled if rule["temperature"] else greedy


def case(B: int, N: int, V: int, dtype: str, rule: str, device: str) -> Case:
    logits, tree = problem(B, N, V, device, DTYPES[dtype])
    arguments = (logits, tree, RULES[rule])
    run = functools.partial(eager, logits, tree, **RULES[rule])
    providers: dict[str, Callable[[], object]] = {"eager": run, "specfuse": ours(*arguments)}
    if sgl_kernel is not None and device == "cuda" and rule in ("greedy", "sampled"):
        providers["sgl-kernel"] = sglang(*arguments)
    return Case(
        name=f"B{B}-N{N}-V{V}-{dtype}-{rule}",
        providers=providers,
        check=functools.partial(check, *arguments),
        bytes=logits.numel() * logits.element_size(),
        sizes={"rows": B * N, "V": V, "B": B},
        small=(B, N, V) in SMALL,
        compile=run if (B, N) == (1, 16) else None,  # one shape tells what the compiler makes of it
    )


def cases(device: str) -> Iterator[Case]:
    for shape in [*SMALL, *LARGE] if device == "cuda" else SMALL:
        for dtype in DTYPES if shape in SMALL else ("bf16",):
            for rule in RULES:
                yield case(*shape, dtype, rule, device)


def tunings(device: str) -> Iterator[Tuning]:
    """Greedy and sampled calls in turn: the op cannot know on the host which one a row wants."""
    for B, N, V in [*SMALL, *LARGE]:
        logits, tree = problem(B, N, V, device, torch.bfloat16)
        calls = [ours(logits, tree, RULES[rule]) for rule in ("greedy", "sampled")]
        yield Tuning(
            sizes={"rows": B * N, "V": V, "B": B},
            configs=[
                {"splits": splits, "cluster": cluster}
                for splits in (0, 1, 2, 4, 8, 16, 32)
                for cluster in (1, 2, 4, 8)
                if splits * B * N <= 65536
            ],
            call=lambda calls=calls: [call() for call in calls],
            check=lambda arguments=(logits, tree): [
                check(*arguments, RULES[r]) for r in ("greedy", "sampled")
            ],
        )


def pytest_generate_tests(metafunc: Any) -> None:
    parametrize(metafunc, cases)


def test_bench_verify_tree(benchmark: Any, case: Callable[[], Case], provider: str) -> None:
    run_case(benchmark, case, provider)


if __name__ == "__main__":
    main(__doc__, cases)
