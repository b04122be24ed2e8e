"""HeadDrafter: answers stay those of ``model.generate``, and drafts are what the head's definition says."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripted_drafters import OracleDrafter
from test_drafters import check_protocol
from tiny_models import random_prompts, tiny_llama, tiny_qwen2, tiny_video_llava, video_inputs

import specfuse
from specfuse import CombinedDrafter, HeadDrafter, PromptLookupDrafter
from specfuse.cli.main import run
from specfuse.drafters import DraftHead, DraftState, HeadConfig, root_only
from specfuse.models.checkpoint import load_video_llava
from specfuse.session import VideoSession
from specfuse.tree import TokenTree

MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "video": tiny_video_llava}
NEW = 20


def head_for(model, seed: int = 0, **sizes) -> DraftHead:
    """A random head with opinions of its own."""
    config = model.config.get_text_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = DraftHead(HeadConfig(config.hidden_size, config.vocab_size, inner=48, **sizes))
        with torch.no_grad():
            for parameter in head.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        if head.shortlist is not None:
            head.shortlist = torch.randperm(config.vocab_size)[: len(head.shortlist)].sort().values
    return head.to(model.dtype)


def inputs_for(model, batch: int, **options):
    takes_video = hasattr(model.config, "video_token_index")
    return video_inputs(model, batch, **options) if takes_video else random_prompts(model, batch, **options)


class Spy(HeadDrafter):
    """Keeps every proposal; drafts the right answer among others where it knows one."""

    oracle: OracleDrafter | None = None

    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        if not hasattr(self, "seen"):
            self.seen: list[tuple[list[list[int]], TokenTree]] = []
        tree = super().propose(state, max_nodes)
        check_protocol(tree, state, max_nodes)
        self.seen.append(([list(answer) for answer in state.answers], tree))
        return self.oracle.propose(state, max_nodes) if self.oracle else tree


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("batch", [1, 4])
def test_answers_are_those_of_generate(kind, batch):
    model = MODELS[kind](seed=5)
    inputs = inputs_for(model, batch)
    plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    drafter = Spy(head_for(model), model, min_prob=0.0, level_prob=0.0, depth=3)
    fast = specfuse.generate(model, drafter, **inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(plain, fast)
    assert any(tree.width > 1 for _, tree in drafter.seen)


@torch.no_grad()
def chances_by_definition(
    model, head: DraftHead, inputs, row: int, answer, path, events=None
) -> torch.Tensor:
    """The head's distribution behind ``path``, in plain attention over everything, position by position."""
    pads = int((inputs["attention_mask"][row] == 0).sum())
    prompt = inputs["input_ids"][row, pads:].tolist()
    pixels = {k: v[row : row + 1] for k, v in inputs.items() if k.startswith("pixel")}
    ids = torch.tensor([prompt + answer])
    states = model(input_ids=ids, **pixels, output_hidden_states=True).hidden_states[-1][0]
    visual = {getattr(model.config, "video_token_index", None)}
    first = max((i + 1 for i, token in enumerate(prompt) if token in visual), default=0)
    embedding = model.get_input_embeddings().weight
    tokens = ids[0, first + 1 :]
    xs = [] if events is None else list(head.events(events[row]))
    xs += list(head.token_inputs(embedding[tokens]) + head.state_inputs(states[first:-1]))
    places = torch.arange(len(xs))
    x = torch.stack(xs)[None]
    keys, values = head.keys_values(head.normed(x), head.turns(512, x.device)[None, places])
    x = x[:, -1:]
    for depth in range(len(path) + 1):
        turns = head.turns(512, x.device)[None, len(xs) - 1 + depth, None]
        queries = head.queries(head.normed(x), turns)
        weights = (queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5).softmax(-1)
        g = head.finish(x, weights @ values)
        if depth < len(path):
            x = head.token_inputs(embedding[path[depth]]) + head.state_inputs(g)
    logits = model.get_output_embeddings()(g)[0, 0]
    if head.shortlist is not None:
        banned = torch.ones_like(logits, dtype=torch.bool)
        banned[head.shortlist] = False
        logits = logits.masked_fill(banned, -float("inf"))
    return logits.softmax(-1)


def check_drafts(model, drafter: Spy, inputs, events=None) -> int:
    """Compares the chances of drafted nodes with the definition; returns how many nodes were compared."""
    compared = 0
    for answers, tree in drafter.seen[::3]:
        for row in range(tree.batch_size):
            tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
            paths, reached = {0: []}, {0: 1.0}
            for node in range(1, int(tree.num_nodes[row])):
                above = paths[parents[node]]
                paths[node] = [*above, tokens[node]]
                reached[node] = float(tree.probs[row, node])
                if node > 6:
                    continue
                chances = chances_by_definition(model, drafter.head, inputs, row, answers[row], above, events)
                expected = reached[parents[node]] * float(chances[tokens[node]])
                assert reached[node] == pytest.approx(expected, abs=2e-5, rel=1e-3)
                assert above or float(chances[tokens[node]]) >= float(chances.topk(4).values[-1]) - 1e-6
                compared += 1
    return compared


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("accepts", [False, True], ids=["rejected", "accepted"])
def test_drafts_are_what_the_definition_says(kind, batch, accepts):
    model = MODELS[kind](seed=6, eos=False)
    inputs = inputs_for(model, batch)
    drafter = Spy(head_for(model), model, min_prob=0.0, level_prob=0.0, depth=3)
    if accepts:
        plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        right = plain[:, inputs["input_ids"].shape[1] :].tolist()
        drafter.oracle = OracleDrafter(right, 120, seed=1)
    specfuse.generate(model, drafter, max_nodes=12, **inputs, max_new_tokens=NEW, do_sample=False)
    assert check_drafts(model, drafter, inputs) > 5
    lengths = [[len(answer) for answer in answers] for answers, _ in drafter.seen]
    if not accepts:
        assert any(max(after) > max(before) + 1 for before, after in pairwise(lengths)), "it never rested"
    elif batch > 1:
        assert any(len(set(row)) > 1 for row in lengths), "rows never had different lengths"


@pytest.mark.parametrize("sampled", [False, True])
def test_only_tokens_of_the_shortlist_are_drafted(sampled):
    model = tiny_video_llava(seed=6, eos=False)
    inputs = video_inputs(model, 2)
    head = head_for(model, shortlist=30)
    drafter = Spy(head, model, min_prob=0.0, level_prob=0.0, depth=3)
    options = {**inputs, "max_new_tokens": NEW, "do_sample": sampled, "seed": 4}
    fast = specfuse.generate(model, drafter, max_nodes=12, **options)
    assert torch.equal(fast, specfuse.generate(model, None, **options))
    for _, tree in drafter.seen:
        for row in range(2):
            drafted = tree.tokens[row, 1 : int(tree.num_nodes[row])]
            assert torch.isin(drafted, head.shortlist).all()
    assert sampled or check_drafts(model, drafter, inputs) > 5


def test_events_come_before_the_text():
    model = tiny_video_llava(seed=6, eos=False)
    inputs = video_inputs(model, 2)
    drafter = Spy(head_for(model, event_width=24), model, min_prob=0.0, depth=2)
    events = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 6, "do_sample": False, "draft_inputs": {"event_features": events}}
    fast = specfuse.generate(model, drafter, **inputs, **options)
    assert torch.equal(fast, model.generate(**inputs, max_new_tokens=6, do_sample=False))
    assert check_drafts(model, drafter, inputs, events) > 5


def test_events_repeat_with_their_rows():
    model = tiny_video_llava(seed=6, eos=False)
    drafter = Spy(head_for(model, event_width=24), model, min_prob=0.0, depth=2)
    events = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    for rows, streams, copies in ((2, 1, 1), (1, 1, 3), (2, 2, 2), (1, 2, 2)):
        inputs = video_inputs(model, rows)
        options = {"max_new_tokens": 4, "do_sample": True, "seed": 3, "num_return_sequences": copies}
        given = {"event_features": events[:streams]}
        fast = specfuse.generate(model, drafter, **inputs, **options, draft_inputs=given)
        assert torch.equal(fast, specfuse.generate(model, None, **inputs, **options))
    two = {name: values.repeat(2, 1) for name, values in video_inputs(model, 1).items() if values.dim() == 2}
    pixels = video_inputs(model, 1)["pixel_values_videos"].repeat(2, 1, 1, 1, 1)
    greedy = {"max_new_tokens": 4, "do_sample": False, "draft_inputs": {"event_features": events[:1]}}
    drafter.seen.clear()
    specfuse.generate(model, drafter, **two, pixel_values_videos=pixels, **greedy)
    first, second = drafter.seen[0][1].tokens.tolist()
    assert first == second and len(first) > 3


@pytest.mark.parametrize(
    "features", [None, torch.zeros(3, 5, 24), torch.zeros(2, 5, 23), torch.zeros(2, 24), [[[0.0]]], "events"]
)
def test_wrong_events_are_named(features):
    model = tiny_video_llava(seed=6)
    drafter = HeadDrafter(head_for(model, event_width=24), model)
    draft_inputs = None if features is None else {"event_features": features}
    with pytest.raises(ValueError, match="event_features"):
        specfuse.generate(
            model, drafter, **video_inputs(model, 2), max_new_tokens=6, draft_inputs=draft_inputs
        )


def test_draft_inputs_have_names():
    model = tiny_video_llava(seed=6)
    drafter = HeadDrafter(head_for(model, event_width=24), model)
    with pytest.raises(ValueError, match="draft_inputs must map names to tensors, got Tensor"):
        specfuse.generate(model, drafter, **video_inputs(model, 1), draft_inputs=torch.zeros(1, 5, 24))


@pytest.mark.parametrize(
    "other, text",
    [
        ({"hidden": 32, "heads": 2}, "hidden size 64, this one has 32"),
        ({"vocab": 300}, "vocabulary 128, this one has 300"),
        ({"dtype": torch.bfloat16}, r"dtype torch.float32, this one has torch.bfloat16"),
    ],
)
def test_it_drafts_for_targets_like_its_own(other, text):
    model, another = tiny_llama(seed=1), tiny_llama(seed=2, **other)
    drafter = HeadDrafter(head_for(model), model)
    with pytest.raises(ValueError, match=text):
        specfuse.generate(another, drafter, **random_prompts(another, 2), max_new_tokens=9, do_sample=False)
    with pytest.raises(ValueError, match="head must be a DraftHead, got LlamaForCausalLM"):
        HeadDrafter(model, model)


def test_it_may_be_asked_twice():
    model = tiny_llama(seed=1, eos=False)
    inputs = random_prompts(model, 2)
    drafter = HeadDrafter(head_for(model), model)
    both = CombinedDrafter([drafter, drafter], min_gain=0)
    options = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(
        specfuse.generate(model, both, **inputs, **options), model.generate(**inputs, **options)
    )


def trained_on(model, inputs, answers: torch.Tensor, steps: int = 150) -> DraftHead:
    """A head that has learned one answer of one row by heart, one step at a time."""
    head = head_for(model)
    ids = torch.cat([inputs["input_ids"], answers], 1)
    pixels = {k: v for k, v in inputs.items() if k.startswith("pixel")}
    with torch.no_grad():
        states = model(input_ids=ids, **pixels, output_hidden_states=True).hidden_states[-1]
    first = inputs["input_ids"].shape[1] - 1
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    embeddings = model.get_input_embeddings()(ids).detach()
    for _ in range(steps):
        x = head.token_inputs(embeddings[:, 1:]) + head.state_inputs(states[:, :-1])
        turns = head.turns(512, x.device)[None, : x.shape[1]]
        normed = head.normed(x)
        keys, values = head.keys_values(normed, turns)
        queries = head.queries(normed, turns)
        g = head.finish(x, F.scaled_dot_product_attention(queries, keys, values, is_causal=True))
        logits = model.get_output_embeddings()(g)[0, first:-1]
        loss = F.cross_entropy(logits, ids[0, first + 2 :]) + F.mse_loss(
            g[:, first:-1], states[:, first + 1 : -1]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


@pytest.fixture(scope="module")
def learned():
    """A model, a prompt, its answer and a head that knows it."""
    model = tiny_video_llava(seed=7, eos=False)
    inputs = video_inputs(model, 1, text_lens=[9])
    plain = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    head = trained_on(model, inputs, plain[:, inputs["input_ids"].shape[1] :])
    return model, inputs, plain, head


def test_a_head_that_knows_the_answer_saves_passes(learned):
    model, inputs, plain, head = learned
    generator = specfuse.SpeculativeGenerator(model, HeadDrafter(head, model))
    assert torch.equal(generator.generate(**inputs, max_new_tokens=40, do_sample=False), plain)
    assert generator.last_stats.tokens_per_pass > 1.5


def test_a_level_is_drafted_where_it_is_likely_to_be_reached(learned):
    """The tree ends behind the first level whose frontier is less likely to be reached than asked for."""
    model, inputs, _, head = learned
    depths = {}
    for level_prob in (0.0, 0.5, 0.95):
        drafter = Spy(head, model, min_prob=0.0, level_prob=level_prob, depth=5, branching=2)
        specfuse.generate(model, drafter, max_nodes=60, **inputs, max_new_tokens=20, do_sample=False)
        early = [tree for answers, tree in drafter.seen if len(answers[0]) < 14]
        depths[level_prob] = [int(tree.depths().max()) for tree in early]
        for _, tree in drafter.seen:
            levels, chances = tree.depths()[0, : int(tree.num_nodes[0])], tree.probs[0]
            for depth in range(1, int(levels.max())):
                best = chances[: len(levels)][levels == depth].topk(2).values
                assert float(best.sum()) >= level_prob - 1e-6
    assert set(depths[0.0]) == {5} and max(depths[0.95]) > min(depths[0.95])
    assert sum(depths[0.5]) >= sum(depths[0.95])


def test_with_a_cached_clip_and_among_other_drafters(learned):
    model, inputs, plain, head = learned
    options = {**inputs, "max_new_tokens": 40, "do_sample": False}
    combined = CombinedDrafter([PromptLookupDrafter(), HeadDrafter(head, model)])
    with specfuse.patched(model) as cache:
        for drafter in (HeadDrafter(head, model), HeadDrafter(head, model), combined):
            generator = specfuse.SpeculativeGenerator(model, drafter)
            assert torch.equal(generator.generate(**options), plain)
            assert generator.last_stats.tokens_per_pass > 1.5
        assert cache.stats.hits == 2
    for nodes in ("auto", 1, 3):
        assert torch.equal(specfuse.generate(model, combined, max_nodes=nodes, **options), plain)


@pytest.mark.parametrize("batch", [1, 4])
def test_sampling(learned, batch):
    model, _, _, head = learned
    inputs = video_inputs(model, batch)
    options = {**inputs, "max_new_tokens": NEW, "do_sample": True, "seed": 3, "temperature": 0.8}
    plain = specfuse.generate(model, None, **options)
    drafter = Spy(head, model, min_prob=0.0, level_prob=0.0, depth=3)
    assert torch.equal(plain, specfuse.generate(model, drafter, **options))


def test_a_sampled_draft_uses_the_noise_of_the_target(learned):
    """With a target that is as unsure as the head, drafts picked with other noise would rarely be right."""
    model, inputs, _, head = learned
    options = {**inputs, "max_new_tokens": 40, "do_sample": True, "top_k": 0}
    options |= {"temperature": 3.0, "return_dict_in_generate": True}
    drafter = HeadDrafter(head, model, min_prob=0.0, branching=1, depth=1)
    accepted = [
        specfuse.generate(model, drafter, max_nodes=1, seed=seed, **options).stats.tokens_per_pass - 1
        for seed in range(6)
    ]
    blind = HeadDrafter(head, model, min_prob=0.0, branching=1, depth=1)
    blind.propose = lambda state, n: HeadDrafter.propose(blind, unsampled(state), n)
    unlucky = [
        specfuse.generate(model, blind, max_nodes=1, seed=seed, **options).stats.tokens_per_pass - 1
        for seed in range(6)
    ]
    assert sum(accepted) > 1.3 * sum(unlucky)


def unsampled(state: DraftState) -> DraftState:
    copied = DraftState(**{name: getattr(state, name) for name in state.__dataclass_fields__})
    copied.choice = None
    return copied


def test_it_asks_for_states_and_rests_without():
    model = tiny_llama()
    drafter = HeadDrafter(head_for(model), model)
    assert drafter.needs_target
    state = DraftState([[4, 5]], [[6]], [True], [9])
    assert torch.equal(drafter.propose(state, 8).tokens, root_only(state).tokens)


def test_a_conversation_has_the_states_of_what_is_new(tiny_directory: Path):
    model, processor = load_video_llava(tiny_directory, dtype=torch.float32)
    frames = np.random.default_rng(0).integers(0, 256, (8, 60, 72, 3), dtype=np.uint8)
    drafter = Spy(head_for(model, seed=2), model, min_prob=0.0)
    drafting, plain = (VideoSession(model, processor, frames, used) for used in (drafter, None))
    for question in ("What is happening?", "Is it raining?"):
        answers = [each.ask(question, max_new_tokens=10) for each in (drafting, plain)]
        assert answers[0].tokens == answers[1].tokens
    assert len(drafter.seen) > 8 and all(tree.width > 1 for _, tree in drafter.seen[-3:-2])


def test_the_command_takes_a_head(tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, _ = load_video_llava(tiny_directory, dtype=torch.float32)
    head_for(model).save_pretrained(tmp_path / "head")
    arguments = ["--model", tiny_directory, "--video", tiny_directory / "example.gif", "--question", "What?"]
    arguments += ["--max-new-tokens", 8, "--compare", "--repeats", 1, "--json", "--drafter"]
    assert run(["generate", *map(str, arguments), str(tmp_path / "head")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["compare"]["tokens_equal"] and report["drafted"] > 0
    head_for(model, event_width=24).save_pretrained(tmp_path / "seeing")
    assert run(["generate", *map(str, arguments), str(tmp_path / "seeing")]) == 2
    told = capsys.readouterr()
    assert f"--drafter {tmp_path / 'seeing'}: this head was trained with events" in told.err
    assert not told.out and told.err.count("\n") == 1
