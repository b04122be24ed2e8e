"""Sampling: a seed gives the same tokens with any drafter; the distribution is that of model.generate."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from scripted_drafters import OracleDrafter, RandomTreeDrafter
from tiny_models import random_prompts, tiny_llama, tiny_video_llava, video_inputs
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import specfuse
from specfuse import ModelDrafter, PromptLookupDrafter
from specfuse.verify import TokenChoice

SETTINGS = [
    {"temperature": 1.0, "top_k": 0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.6, "top_k": 0, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.2, "top_k": 0, "typical_p": 0.8},
    {"temperature": 1.1, "top_k": 0, "repetition_penalty": 1.3},
]


def identify(settings) -> str:
    return "-".join(f"{k}{v}" for k, v in settings.items())


@pytest.mark.parametrize("settings", SETTINGS, ids=identify)
@pytest.mark.parametrize("batch", [1, 4])
def test_same_seed_same_tokens_with_any_drafter(batch, settings):
    model = tiny_llama(seed=0, dtype=torch.float64)
    inputs = random_prompts(model, batch)
    kwargs = {**inputs, **settings, "do_sample": True, "max_new_tokens": 16}
    for seed in (0, 7):
        expected = specfuse.generate(model, None, seed=seed, **kwargs)
        length = inputs["input_ids"].shape[1]
        oracle = OracleDrafter(expected[:, length:].tolist(), vocab=128, seed=seed)
        for drafter in (oracle, RandomTreeDrafter(128), PromptLookupDrafter(), ModelDrafter(model, depth=3)):
            assert torch.equal(specfuse.generate(model, drafter, seed=seed, **kwargs), expected)
    other = specfuse.generate(model, None, seed=1, **kwargs)
    assert not torch.equal(other, expected)


def test_scores_do_not_change_the_sample():
    model = tiny_llama(seed=0, dtype=torch.float64)
    kwargs = {**random_prompts(model, 2), "do_sample": True, "max_new_tokens": 12, "top_k": 20, "seed": 3}
    fused = specfuse.generate(model, None, **kwargs)
    kept = specfuse.generate(model, None, **kwargs, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(kept.sequences, fused)


def test_rows_are_independent_of_their_batch():
    model = tiny_llama(seed=1, dtype=torch.float64, eos=False)
    inputs = random_prompts(model, 3)
    kwargs = {"do_sample": True, "max_new_tokens": 12}
    together = specfuse.generate(model, None, seed=[5, 6, 7], **inputs, **kwargs)
    shuffled = {k: v[[2, 0, 1]] for k, v in inputs.items()}
    again = specfuse.generate(model, None, seed=[7, 5, 6], **shuffled, **kwargs)
    assert torch.equal(again, together[[2, 0, 1]])
    kept = inputs["attention_mask"][0].bool()
    alone = specfuse.generate(model, None, seed=5, input_ids=inputs["input_ids"][:1, kept], **kwargs)
    assert torch.equal(alone[0, -12:], together[0, -12:])


def test_torch_manual_seed_makes_it_reproducible():
    model = tiny_llama(seed=0)
    kwargs = {**random_prompts(model, 1), "do_sample": True, "max_new_tokens": 12}
    samples = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        samples.append(specfuse.generate(model, PromptLookupDrafter(), **kwargs))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_several_samples_per_prompt():
    model = tiny_video_llava(seed=0, eos=False)
    inputs = video_inputs(model, 2)
    kwargs = {**inputs, "do_sample": True, "max_new_tokens": 8, "num_return_sequences": 3}
    out = specfuse.generate(model, PromptLookupDrafter(), seed=0, **kwargs)
    assert out.shape == (6, inputs["input_ids"].shape[1] + 8)
    assert torch.equal(out, specfuse.generate(model, None, seed=0, **kwargs))
    assert len({tuple(row[-8:].tolist()) for row in out[:3]}) == 3
    assert torch.equal(out, specfuse.generate(model, ModelDrafter(model, depth=2), seed=0, **kwargs))


def test_a_copy_of_the_target_drafts_its_very_samples():
    """The draft model picks with the target's noise, so a bit-identical copy is right even under sampling."""
    model = tiny_llama(seed=0, dtype=torch.float64, eos=False)
    generator = specfuse.SpeculativeGenerator(model, ModelDrafter(model, depth=4))
    generator.generate(**random_prompts(model, 2), seed=0, do_sample=True, temperature=1.5, max_new_tokens=20)
    assert generator.last_stats.passes == 2 * 20 // 5


# ---------------------------------------------------------------- distributions

STEPS = 3
SAMPLES = 3000
FILTERS = {"temperature": 1.4, "top_k": 5, "top_p": 0.93}


def small_vocabulary_model():
    return tiny_llama(seed=4, dtype=torch.float64, vocab=7, eos=False)


def exact_distribution(model, ids, warpers) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of STEPS tokens, token by token from the model itself."""
    vocab = model.config.vocab_size
    paths = {(): 1.0}
    for _ in range(STEPS):
        rows = torch.tensor([[*ids, *path] for path in paths])
        scores = warpers(rows, model(rows).logits[:, -1].detach().float())
        probs = scores.double().softmax(-1)
        paths = {
            (*path, token): mass * float(probs[i, token])
            for i, (path, mass) in enumerate(paths.items())
            for token in range(vocab)
            if mass * float(probs[i, token]) > 0
        }
    return paths


def warpers() -> LogitsProcessorList:
    return LogitsProcessorList(
        [
            TemperatureLogitsWarper(FILTERS["temperature"]),
            TopKLogitsWarper(FILTERS["top_k"]),
            TopPLogitsWarper(FILTERS["top_p"]),
            MinPLogitsWarper(0.01),
        ]
    )


def sample(model, drafter, seed: int = 0) -> Counter[tuple[int, ...]]:
    ids = random_prompts(model, 1)["input_ids"].expand(SAMPLES, -1)
    out = specfuse.generate(
        model,
        drafter,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        min_p=0.01,
        max_new_tokens=STEPS,
        max_nodes=12,
        seed=seed,
        **FILTERS,
    )
    return Counter(map(tuple, out[:, -STEPS:].tolist()))


def p_value(counts: Counter[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> float:
    """Chi-square of the sampled continuations; rare ones are pooled. 0 if an impossible one was sampled."""
    if any(path not in exact for path in counts):
        return 0.0
    total = sum(counts.values())
    common = [path for path, mass in exact.items() if mass * total >= 8]
    observed = [counts[path] for path in common]
    expected = [exact[path] * total for path in common]
    if total - sum(expected) > 1:
        observed.append(total - sum(observed))
        expected.append(total - sum(expected))
    scale = total / sum(expected)
    return float(chisquare(observed, [e * scale for e in expected]).pvalue)


@pytest.mark.parametrize("kind", ["none", "random-trees", "all-tokens", "lookup"])
def test_distribution_is_exact(kind):
    model = small_vocabulary_model()
    vocab = model.config.vocab_size
    drafter = {
        "none": None,
        "random-trees": RandomTreeDrafter(vocab, seed=1),
        "all-tokens": EveryTokenDrafter(vocab),
        "lookup": PromptLookupDrafter(),
    }[kind]
    exact = exact_distribution(model, random_prompts(model, 1)["input_ids"][0].tolist(), warpers())
    assert len(exact) > 20
    assert p_value(sample(model, drafter), exact) > 1e-3


def test_distribution_is_that_of_generate():
    model = small_vocabulary_model()
    ids = random_prompts(model, 1)["input_ids"].expand(SAMPLES, -1)
    torch.manual_seed(0)
    theirs = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        min_p=0.01,
        max_new_tokens=STEPS,
        **FILTERS,
    )
    theirs = Counter(map(tuple, theirs[:, -STEPS:].tolist()))
    ours = sample(model, EveryTokenDrafter(model.config.vocab_size), seed=10**6)
    common = [path for path in theirs | ours if theirs[path] + ours[path] >= 10]
    table = [[counts[path] for path in common] for counts in (theirs, ours)]
    assert chi2_contingency(table).pvalue > 1e-3


class EveryTokenDrafter(RandomTreeDrafter):
    """All tokens as siblings at depth 1, some again at depth 2: every pass accepts something."""

    def propose(self, state, max_nodes):
        chains = [[token, (token * 3 + 1) % self.vocab] for token in range(self.vocab)]
        roots = [state.root(b) for b in range(state.batch_size)]
        return specfuse.TokenTree.from_sequences(roots, [chains] * len(roots), max_nodes)


@pytest.mark.parametrize("fault", ["siblings-drawn-separately", "colder", "no-filter"])
def test_a_wrong_rule_fails_the_distribution_test(fault, monkeypatch):
    """Negative control: the same test must notice rules that are wrong in the ways rules usually are."""
    model = small_vocabulary_model()
    right = TokenChoice.pick

    def wrong(self, logits, tree, positions, seeds):
        if fault == "colder":
            return right(_replaced(self, temperature=0.8 * self.temperature), logits, tree, positions, seeds)
        if fault == "no-filter":
            return right(_replaced(self, top_k=0), logits, tree, positions, seeds)
        return _separate_coins(self, logits, tree, positions, seeds)

    monkeypatch.setattr(TokenChoice, "pick", wrong)
    exact = exact_distribution(model, random_prompts(model, 1)["input_ids"][0].tolist(), warpers())
    assert p_value(sample(model, EveryTokenDrafter(model.config.vocab_size)), exact) < 1e-6


def _replaced(choice: TokenChoice, **changes) -> TokenChoice:
    return dataclasses.replace(choice, **changes)


def _separate_coins(choice, logits, tree, positions, seeds):
    """Accepts each drafted child by a coin of its own: a classic mistake."""
    from specfuse.ops.verify_tree import AcceptedPath

    generator = torch.Generator().manual_seed(int(seeds[0]))
    batch, width, _ = logits.shape
    flat = warpers()(None, logits.reshape(batch * width, -1).float()).softmax(-1).reshape(batch, width, -1)
    paths, nexts = [], []
    for b in range(batch):
        path, node = [0], 0
        tokens, parents = tree.tokens[b].tolist(), tree.parents[b].tolist()
        while True:
            children = [c for c in range(node + 1, int(tree.num_nodes[b])) if parents[c] == node]
            coins = torch.rand(len(children), generator=generator).tolist()
            hit = next(
                (c for c, coin in zip(children, coins, strict=True) if coin < flat[b, node, tokens[c]]), None
            )
            if hit is None:
                break
            path.append(hit)
            node = hit
        nexts.append(int(torch.multinomial(flat[b, node], 1, generator=generator)))
        paths.append(path)
    padded = torch.tensor([p + [-1] * (width - len(p)) for p in paths], dtype=torch.int32)
    lengths = torch.tensor([len(p) for p in paths], dtype=torch.int32) * (tree.num_nodes > 0)
    return AcceptedPath(padded, lengths, torch.tensor(nexts), torch.zeros(batch, width))


def test_the_exact_distribution_sums_to_one():
    model = small_vocabulary_model()
    exact = exact_distribution(model, random_prompts(model, 1)["input_ids"][0].tolist(), warpers())
    assert abs(sum(exact.values()) - 1) < 1e-9
    assert all(0 <= token < 7 for token in itertools.chain.from_iterable(exact))


@pytest.mark.parametrize("with_ids", [False, True])
def test_drafts_share_the_noise_behind_a_prompt_of_embeddings(with_ids):
    model = tiny_llama(seed=1, eos=False)
    inputs = random_prompts(model, 2)
    embeds = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    if not with_ids:
        del embeds["input_ids"]
    drafter = ModelDrafter(model, inputs=inputs)
    options = {"max_new_tokens": 24, "do_sample": True, "seed": 3}
    fast = specfuse.generate(model, drafter, **embeds, **options, return_dict_in_generate=True)
    assert torch.equal(fast.sequences, specfuse.generate(model, None, **embeds, **options))
    # The target drafts for itself: every draft is its own choice.
    assert fast.stats.tokens_per_pass == 6.0
