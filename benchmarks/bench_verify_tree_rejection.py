"""verify_tree_rejection against eager PyTorch and torch.compile, and how much it accepts.

    python benchmarks/bench_verify_tree_rejection.py [--device cuda] [--no-compile] [--json]
    python benchmarks/bench_verify_tree_rejection.py --acceptance    # tokens per pass, beside verify_tree
    pytest benchmarks/bench_verify_tree_rejection.py                 # the calls under pytest-benchmark

`eager` is what one writes without the op and without waiting for the device: softmax of all N rows, then per
sibling a test and a residual of all rows, an argmax over perturbed logarithms, a walk of the tree's depth. It
is compared with the op first, on the op's own noise. The trees are drawn from q, which is the target's
distribution with noise in its logits. `bytes` is one read of the visited rows of p, and of q at nodes with
children. Where they import, flashinfer's chain_speculative_sampling (chains; the same rule) and sgl-kernel's
tree_speculative_sampling_target_only (which accepts less) are providers, softmax included; both untried.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from harness import Case, Tuning, main, parametrize, run_case
from torch import Tensor

from specfuse.kernels.philox_ref import COIN, RESIDUAL, gumbel, uniform
from specfuse.ops import AcceptedPath, verify_tree, verify_tree_rejection
from specfuse.tree import TokenTree

SEED, SHARPNESS, NOISE = 7, 2.5, 1.0  # logits as spread as real ones; how far q is from p
SHAPES = [(1, 8, 32000), (1, 16, 32000), (16, 16, 32000), (64, 16, 32000), (256, 8, 32000), (8, 32, 151936)]
UNFILTERED = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}
SPARSE = 64  # entries of q where it is given by its largest


class Problem(NamedTuple):
    """A batch of drafted trees, all of one shape."""

    logits: Tensor  # [B, N, V]
    q: Tensor  # [B, N, W]
    ids: Tensor | None  # [B, N, W]
    tree: TokenTree
    children: Tensor  # [N, C] child of each ordinal, -1 where there is none
    depths: Tensor  # [N]


def parent_list(N: int, branches: int) -> list[int]:
    """Below the root ``branches`` chains of equal length."""
    return [-1, *(0 if i <= branches else i - branches for i in range(1, N))]


def problem(B: int, N: int, V: int, device: str, dtype: torch.dtype, branches: int, sparse: bool) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(B, N, V, generator=generator, device=device) * SHARPNESS
    q = (logits + NOISE * torch.randn(B, N, V, generator=generator, device=device)).softmax(-1)
    ids = None
    if sparse:
        q, ids = q.topk(SPARSE)
        q = q / q.sum(-1, keepdim=True)
    parents = parent_list(N, branches)
    children = torch.full((N, branches), -1)
    tokens = torch.zeros(B, N, dtype=torch.int64, device=device)
    for node in range(N):
        below = [c for c in range(N) if parents[c] == node]
        if below:
            drawn = torch.multinomial(q[:, node], len(below), generator=generator)
            tokens[:, below] = drawn if ids is None else ids[:, node].gather(-1, drawn)
            children[node, : len(below)] = torch.tensor(below)
    above = torch.tensor(parents, dtype=torch.int32, device=device).expand(B, N).contiguous()
    tree = TokenTree(tokens, above, torch.full((B,), N, dtype=torch.int32, device=device))
    return Problem(logits.to(dtype), q.to(dtype), ids, tree, children.to(device), tree.depths()[0].to(device))


def eager(problem: Problem, coins: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Length and next token of every row. coins: [B, N, C]; noise: [B, N, V]."""
    logits, q, ids, tree, children, _ = problem
    left = logits.float().softmax(-1)
    q = q.float() if ids is None else torch.zeros_like(left).scatter(-1, ids, q.float())
    q = q / q.sum(-1, keepdim=True)
    B, N, _V = left.shape
    chosen = torch.full((B, N), -1, device=left.device)
    for j in range(children.shape[1]):
        child = children[:, j].expand(B, N)
        token = tree.tokens.gather(1, child.clamp_min(0)).unsqueeze(-1)
        undecided = (chosen < 0) & (child >= 0)
        takes = coins[..., j] * q.gather(-1, token).squeeze(-1) < left.gather(-1, token).squeeze(-1)
        chosen = torch.where(undecided & takes, child, chosen)
        rejected = (undecided & ~takes).unsqueeze(-1)
        rest = (left - q).clamp_min(0)
        left = torch.where(rejected, rest / rest.sum(-1, keepdim=True), left)
        q = q.scatter(-1, token, q.gather(-1, token).masked_fill(rejected, 0))
        q = q / q.sum(-1, keepdim=True)
    emitted = (left.log() + noise).argmax(-1)
    node = torch.zeros(B, 1, dtype=torch.int64, device=left.device)
    length = torch.ones(B, dtype=torch.int64, device=left.device)
    for _ in range(N // children.shape[1] + 1):
        child = chosen.gather(1, node)
        length = length + (child >= 0).squeeze(1)
        node = torch.where(child >= 0, child, node)
    return length, emitted.gather(1, node).squeeze(1)


def random_noise(problem: Problem) -> tuple[Tensor, Tensor]:
    logits, children = problem.logits, problem.children
    coins = torch.rand(*logits.shape[:2], children.shape[1], device=logits.device)
    return coins, -torch.empty_like(logits, dtype=torch.float32).exponential_().log()


def own_noise(problem: Problem) -> tuple[Tensor, Tensor]:
    """The op's noise for every node: for comparing results."""
    B, _N, V = problem.logits.shape
    device = problem.logits.device
    seed = SEED + torch.arange(B, device=device)[:, None, None]
    position = problem.depths[None, :, None] + 1
    coins = uniform(seed, position, torch.arange(problem.children.shape[1], device=device), COIN)
    rows = [gumbel(s, position[0], torch.arange(V, device=device), RESIDUAL).float() for s in seed[:, 0]]
    return coins.float(), torch.stack(rows)


def fused(problem: Problem) -> Callable[[], AcceptedPath]:
    """The op with its parameters as tensors, so that a call is one launch."""
    B, device = problem.logits.shape[0], problem.logits.device
    rows = {name: torch.full((B,), value, device=device) for name, value in UNFILTERED.items()}
    rows["top_k"] = torch.zeros(B, dtype=torch.int32, device=device)
    rows["seed"] = SEED + torch.arange(B, device=device)
    rows["positions"] = torch.zeros(B, dtype=torch.int64, device=device)
    return lambda: verify_tree_rejection(
        problem.logits, problem.tree, problem.q, draft_ids=problem.ids, **rows
    )


def check(problem: Problem) -> None:
    length, token = eager(problem, *own_noise(problem))
    accepted = fused(problem)()
    same = (accepted.length == length) & (accepted.next_token == token)
    # Float sums in another order decide a coin or a near-tie once in many rows.
    assert (~same).sum() <= len(same) // 32, f"rows {(~same).nonzero().flatten().tolist()} differ"


def floor_bytes(problem: Problem) -> int:
    """One read of the rows that the walk visits."""
    path = fused(problem)().path.long()
    visited = path.flatten()[path.flatten() >= 0]
    inner = int((problem.children[visited, 0] >= 0).sum())
    entry = problem.q.element_size() + (0 if problem.ids is None else 8)
    read = len(visited) * problem.logits.shape[2] * problem.logits.element_size()
    return read + inner * problem.q.shape[2] * entry


def flashinfer_chains(problem: Problem) -> Callable[[], object] | None:
    """Flashinfer's kernel, of probabilities; untried."""
    try:
        from flashinfer.sampling import chain_speculative_sampling
    except ImportError:
        return None
    q, drafts = problem.q[:, :-1].float().contiguous(), problem.tree.tokens[:, 1:].int().contiguous()
    return lambda: chain_speculative_sampling(q, drafts, problem.logits.float().softmax(-1))


def sglang_trees(problem: Problem) -> Callable[[], object] | None:
    """sgl-kernel's kernel, which does not use q; untried."""
    try:
        import sgl_kernel
    except ImportError:
        return None
    (B, N, _), device = problem.logits.shape, problem.logits.device
    accepted = torch.full((B, N), -1, dtype=torch.int32, device=device)
    outputs = (accepted.flatten().clone(), accepted, accepted[:, 0].clone())
    encoded = problem.tree.to_sglang()
    coins = torch.rand(B, N, device=device), torch.rand(B, device=device)

    def run() -> None:
        p = problem.logits.float().softmax(-1)
        sgl_kernel.tree_speculative_sampling_target_only(
            *outputs, problem.tree.tokens, *encoded, *coins, p, torch.zeros_like(p)
        )

    return run


def cases(device: str) -> Iterator[Case]:
    """On the CPU batch 1 in float32, on CUDA all shapes in bfloat16."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for B, N, V in SHAPES:
        if B == 1 or device == "cuda":
            for branches in (1, 4):
                for sparse in (False, True):
                    tree = "chain" if branches == 1 else f"{branches}branches"
                    name = f"B{B}-N{N}-V{V}-{tree}-{'sparse' if sparse else 'dense'}"
                    yield case(name, problem(B, N, V, device, dtype, branches, sparse))


def case(name: str, p: Problem) -> Case:
    noise = random_noise(p)
    providers: dict[str, Callable[[], object]] = {
        "eager": lambda: eager(p, *noise),
        "specfuse": fused(p),
    }
    if p.logits.is_cuda and p.ids is None:
        if p.children.shape[1] == 1 and (peer := flashinfer_chains(p)):
            providers["flashinfer"] = peer
        if peer := sglang_trees(p):
            providers["sgl-kernel"] = peer
    B, N, V = p.logits.shape
    return Case(
        name,
        providers,
        lambda: check(p),
        bytes=floor_bytes(p),
        sizes={"B": B, "N": N, "V": V, "W": p.q.shape[2]},
        small=B == 1,
        compile=providers["eager"] if (B, N) == (1, 16) else None,  # each takes the compiler many seconds
    )


def tunings(device: str) -> Iterator[Tuning]:
    """Trees with dense q: blocks per tree."""
    for B, N, V in SHAPES:
        p = problem(B, N, V, device, torch.bfloat16, 4, sparse=False)
        yield Tuning(
            sizes={"B": B, "V": V},
            configs=[{"cluster": cluster} for cluster in (1, 2, 4, 8)],
            call=fused(p),
            check=lambda p=p: check(p),
        )


def acceptance() -> None:
    """Prints tokens per pass of both rules over the same sampled trees, averaged over 2,000 of them."""
    print("tokens per pass over 2,000 trees, V = 500; q is p with noise of this deviation in its logits")
    print("noise  tree          verify_tree  verify_tree_rejection")
    for noise in (0.5, 1.0, 2.0):
        globals()["NOISE"] = noise
        for branches, N in ((1, 5), (2, 9), (4, 17), (8, 33)):
            p = problem(2000, N, 500, "cpu", torch.float32, branches, sparse=False)
            target_only = verify_tree(p.logits, p.tree, temperature=1.0, seed=SEED).length.float().mean()
            rejection = fused(p)().length.float().mean()
            name = f"{branches} x {(N - 1) // branches} deep"
            print(f"{noise:5}  {name:12} {target_only:12.2f} {rejection:22.2f}")


def pytest_generate_tests(metafunc: Any) -> None:
    parametrize(metafunc, cases)


def test_bench_verify_tree_rejection(benchmark: Any, case: Any, provider: str) -> None:
    run_case(benchmark, case, provider)


if __name__ == "__main__":
    if "--acceptance" in sys.argv:
        acceptance()
    else:
        main(__doc__, cases)
