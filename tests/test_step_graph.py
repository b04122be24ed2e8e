"""A step on static tensors gives the tokens of any other; its graphs are few, late, and never in the way.

There is no GPU in these tests (but for the last): bodies run uncaptured, and a stand-in takes the graph's
place where capturing is what is looked at.
"""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from scripted_drafters import OracleDrafter, RandomTreeDrafter
from test_hidden_states import Listener, check_states
from tiny_models import random_prompts, tiny_llama, tiny_qwen2, tiny_video_llava, video_inputs
from transformers import MistralConfig, MistralForCausalLM

import specfuse
from specfuse.pacing import Backoff
from specfuse.passes import step_graph
from specfuse.passes.static_step import RowSettings, StaticStep
from specfuse.passes.step_graph import StepGraphs
from specfuse.passes.tree_forward import TreeForward
from specfuse.verify import TokenChoice

GREEDY = {"max_new_tokens": 24, "do_sample": False}
ATTENTION = ["sdpa", "specfuse_tree", "eager"]


@pytest.fixture
def bodies(monkeypatch):
    """The number of nodes of every static body that ran."""
    ran: list[int] = []
    body = StaticStep.body
    monkeypatch.setattr(StaticStep, "body", lambda self, target: (ran.append(self.nodes), body(self, target)))
    return ran


class StandIn:
    """Takes the place of graph capture: "captures" a body by keeping it; fails as it is told."""

    def __init__(self, fails: dict[int, Exception] | None = None):
        self.captured, self.replayed, self.fails = [], 0, fails or {}

    def __call__(self, body):
        number = len(self.captured)
        self.captured.append(number)
        if number in self.fails:
            raise self.fails[number]

        def replay():
            self.replayed += 1
            body()

        return replay


def use(monkeypatch, model, capture, room=None) -> StepGraphs:
    graphs = StepGraphs(capture, room)
    monkeypatch.setitem(step_graph._GRAPHS, model, graphs)
    return graphs


def answers_of(model, inputs, **options):
    expected = model.generate(**inputs, **options)
    return expected, expected[:, inputs["input_ids"].shape[1] :].tolist()


# ---------------------------------------------------------------- the static body


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_video_llava])
def test_static_steps_give_the_tokens_of_generate(make, batch, attention, bodies):
    model = make(seed=1)
    model.set_attn_implementation(attention)
    video = make is tiny_video_llava
    inputs = video_inputs(model, batch) if video else random_prompts(model, batch)
    expected, right = answers_of(model, inputs, **GREEDY)
    for drafter in (OracleDrafter(right, 126), RandomTreeDrafter(126), None):
        bodies.clear()
        generator = specfuse.SpeculativeGenerator(model, drafter, graphs=True, max_nodes=16)
        assert torch.equal(generator.generate(**inputs, **GREEDY), expected)
        # Every pass of every row but the prompt's.
        assert batch * (len(bodies) + 1) >= generator.last_stats.passes > len(bodies)
        assert set(bodies) <= {1, 5, 9, 17}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sampling_and_dtypes(dtype, bodies):
    model = tiny_llama(seed=2, dtype=dtype)
    inputs = random_prompts(model, 2)
    options = {**inputs, "max_new_tokens": 20, "do_sample": True, "top_p": 0.9, "temperature": 1.3, "seed": 5}
    drafter = RandomTreeDrafter(128)
    usual = specfuse.generate(model, drafter, graphs=False, **options)
    assert not bodies
    assert torch.equal(specfuse.generate(model, drafter, graphs=True, **options), usual) and bodies
    other = specfuse.generate(model, drafter, graphs=True, **{**options, "seed": 6})
    assert not torch.equal(other, usual), "each call's own seeds are used"


def pass_of(model, tree, nodes, prompt, capacity=32):
    """One static step of ``nodes`` nodes behind a prompt: the step and the cache."""
    target = TreeForward(model, 1, capacity)
    with torch.no_grad():
        target.prefill({"input_ids": prompt}, None)
        choice = TokenChoice(None, 0.0, 0, 1.0, 0.0, torch.zeros(1, dtype=torch.int64))
        settings = RowSettings(1, target.device)
        settings.take(choice, None)
        step = StaticStep(1, nodes, target.cache.buffers(), settings)
        roots = torch.tensor([prompt.shape[1] - 1])
        step.inputs.fill(tree, roots, roots, target.cache.lengths, None)
        step.body(target)
    return step, target.cache


@pytest.mark.parametrize("attention", ATTENTION)
def test_padded_nodes_are_inert(attention):
    model = tiny_llama(seed=4)
    model.set_attn_implementation(attention)
    prompt = random_prompts(model, 1)["input_ids"]
    right = model.generate(prompt, **GREEDY)[0, prompt.shape[1] :].tolist()
    # A wrong branch in between, so that keeping the path moves something.
    tree = specfuse.TokenTree.from_sequences([int(prompt[0, -1])], [[[right[0] ^ 1], right[:3]]])
    exact, cache = pass_of(model, tree, tree.width, prompt)
    length = int(exact.output[0, -2])
    assert length == 4 and exact.output[0, :4].tolist() == [0, 2, 3, 4]
    assert int(exact.output[0, -1]) == right[3]
    for nodes in (9, 17, 64):
        padded, other = pass_of(model, tree, nodes, prompt, capacity=96)
        assert padded.output[0, :4].tolist() == [0, 2, 3, 4]
        assert padded.output[0, -2:].tolist() == exact.output[0, -2:].tolist()
        kept = prompt.shape[1] - 1 + length
        for one, two in zip(cache.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(one[:, :, :kept], two[:, :, :kept])
    broken = tree._replace(parents=tree.parents.clone())
    broken.parents[0, 3] = 1  # the right token, behind another's branch
    assert int(pass_of(model, broken, 17, prompt)[0].output[0, -2]) == 2


def test_a_step_has_as_many_nodes_as_bits_can_name():
    with pytest.raises(ValueError, match="nodes must be from 1 to 64"):
        StaticStep(1, 65, [torch.zeros(1, 1, 4, 4)], RowSettings(1, torch.device("cpu")))


@pytest.mark.parametrize("batch", [1, 3])
def test_hidden_states_are_shown_as_ever(batch, bodies):
    model = tiny_llama(seed=0)
    inputs = random_prompts(model, batch)
    expected, right = answers_of(model, inputs, **GREEDY)
    drafter = Listener(OracleDrafter(right, 126, seed=3))
    assert torch.equal(specfuse.generate(model, drafter, graphs=True, **inputs, **GREEDY), expected)
    check_states(model, drafter.state, inputs)
    assert bodies


# ---------------------------------------------------------------- buffers from call to call


def test_the_next_call_takes_the_buffers_of_the_last(monkeypatch):
    model = tiny_llama(seed=5)
    graphs = use(monkeypatch, model, None)
    places = []
    for seed, batch in [(0, 2), (1, 2), (2, 1), (3, 2), (4, 3)]:
        inputs = random_prompts(model, batch, seed=seed)
        expected, right = answers_of(model, inputs, **GREEDY)
        drafter = OracleDrafter(right, 126, seed)
        assert torch.equal(specfuse.generate(model, drafter, graphs=True, **inputs, **GREEDY), expected)
        places.append(graphs.free[batch].buffers[0].data_ptr())
    assert places[0] == places[1] == places[3] != places[2]
    assert list(graphs.free) == [2, 3], "of two batch sizes, the latest"
    long = {**random_prompts(model, 2, text_lens=[300, 280]), **GREEDY}
    expected = model.generate(**long)
    assert torch.equal(specfuse.generate(model, None, graphs=True, **long), expected)
    assert graphs.free[2].buffers[0].data_ptr() != places[0], "longer ones were needed"


def test_a_call_that_fails_leaves_nothing_behind(monkeypatch):
    model = tiny_llama(seed=5)
    graphs = use(monkeypatch, model, None)
    inputs = {**random_prompts(model, 1), **GREEDY}
    expected = model.generate(**inputs)
    generator = specfuse.SpeculativeGenerator(model, None, graphs=True)
    assert torch.equal(generator.generate(**inputs), expected) and graphs.free
    good = model.lm_head.weight.data.clone()
    model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(FloatingPointError):
        generator.generate(**inputs)
    assert not graphs.free
    model.lm_head.weight.data[:] = good
    assert torch.equal(generator.generate(**inputs), expected)


def test_an_answer_that_outgrows_its_buffers_goes_on_without(monkeypatch, bodies):
    monkeypatch.setattr("specfuse.run.RESERVED_ANSWER", 4)
    monkeypatch.setattr(step_graph, "SLOTS", 1)
    model = tiny_llama(seed=6, eos=False)
    graphs = use(monkeypatch, model, None)
    inputs = {**random_prompts(model, 1), "max_new_tokens": 40, "do_sample": False}
    expected = model.generate(**inputs)
    assert torch.equal(specfuse.generate(model, None, graphs=True, max_nodes=1, **inputs), expected)
    assert 0 < len(bodies) < 39 and not graphs.free


def test_graphs_do_not_keep_a_model_alive():
    model = tiny_llama(seed=0)
    specfuse.generate(model, None, graphs=True, **random_prompts(model, 1), **GREEDY)
    assert model in step_graph._GRAPHS
    before = len(step_graph._GRAPHS)
    del model
    gc.collect()
    assert len(step_graph._GRAPHS) < before


# ---------------------------------------------------------------- capturing, with a stand-in for the graph


def widths(*sizes):
    """A drafter whose trees have these many nodes in turn."""

    class Widths(specfuse.Drafter):
        turn = 0

        def propose(self, state, max_nodes):
            size = sizes[self.turn % len(sizes)]
            self.turn += 1
            return specfuse.TokenTree.from_chains([state.root(0)], [[3] * (size - 1)])

    return Widths()


def answer(model, drafter, tokens=40, **options):
    inputs = {**random_prompts(model, 1), "max_new_tokens": tokens, "do_sample": False}
    generator = specfuse.SpeculativeGenerator(model, drafter, graphs=True, **options)
    # Every pass drafts: nothing is accepted, and a drafter that rests is not what is looked at.
    generator._pace = lambda *_: Restless()
    assert torch.equal(generator.generate(**inputs), model.generate(**inputs))


class Restless(Backoff):
    def rests(self):
        return False


def test_capture_is_late_and_once(monkeypatch, bodies):
    model = tiny_llama(seed=7, eos=False)
    capture = StandIn()
    graphs = use(monkeypatch, model, capture)
    answer(model, None)
    assert len(capture.captured) == 1 and capture.replayed == 39 - step_graph.WARM_UP
    answer(model, None)
    assert len(capture.captured) == 1, "the next call replays at once"
    assert capture.replayed == 78 - step_graph.WARM_UP == len(bodies) - step_graph.WARM_UP
    assert list(graphs.free[1].replays) == [(1, False)]


def moved(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data.clone())


def hooked(model):
    model.lm_head.register_forward_hook(lambda *_: None)


def switched(model):
    model.set_attn_implementation("specfuse_tree")


@pytest.mark.parametrize("change", [moved, hooked, switched])
def test_a_model_that_changed_is_captured_anew(change, monkeypatch):
    model = tiny_llama(seed=7, eos=False)
    capture = StandIn()
    use(monkeypatch, model, capture)
    answer(model, None)
    change(model)
    answer(model, None)
    assert len(capture.captured) == 2
    answer(model, None)
    assert len(capture.captured) == 2


def test_graphs_are_bounded_and_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(step_graph, "MAX_GRAPHS", 2)
    model = tiny_llama(seed=7, eos=False)
    capture = StandIn()
    graphs = use(monkeypatch, model, capture)
    answer(model, widths(1, 5, 9, 17), max_nodes=32)
    assert len(graphs.free[1].replays) <= 2 < len(capture.captured)
    # The last pass of an answer is undrafted.
    assert set(graphs.free[1].steps) >= set(graphs.free[1].replays)


def test_what_can_not_be_captured_runs_without_and_is_told_once(monkeypatch, caplog):
    model = tiny_llama(seed=7, eos=False)
    capture = StandIn({0: RuntimeError("operation not permitted when stream is capturing")})
    graphs = use(monkeypatch, model, capture)
    with caplog.at_level(logging.WARNING, logger="specfuse"):
        answer(model, widths(5))
        answer(model, widths(9))
    assert len(capture.captured) == 1 and capture.replayed == 0 and graphs.limit == 0
    assert [r.message for r in caplog.records if "can not be captured" in r.message] == [
        "steps of this model can not be captured in a CUDA graph and run without: operation not permitted "
        "when stream is capturing"
    ]


def test_out_of_memory_leaves_the_smaller_sizes(monkeypatch, caplog):
    model = tiny_llama(seed=7, eos=False)
    capture = StandIn({0: torch.OutOfMemoryError("tried to allocate 20 GiB")})
    graphs = use(monkeypatch, model, capture)
    with caplog.at_level(logging.WARNING, logger="specfuse"):
        answer(model, widths(17))
    assert graphs.limit == 9 and [r.message for r in caplog.records] == [
        "no memory for steps of 17 nodes in a CUDA graph, 9 at most: tried to allocate 20 GiB"
    ]
    before = capture.replayed
    answer(model, widths(9))
    assert capture.replayed > before, "the next smaller size is captured"
    before = capture.replayed
    answer(model, widths(17), tokens=4)
    assert capture.replayed - before <= 1, "but for the last pass, which is undrafted"


def test_nothing_is_captured_while_memory_is_short(monkeypatch, caplog):
    model = tiny_llama(seed=7, eos=False)
    left, capture = {"bytes": 1000}, StandIn()
    use(monkeypatch, model, capture, lambda: left["bytes"])
    with caplog.at_level(logging.WARNING, logger="specfuse"):
        answer(model, widths(17))
    assert not capture.captured and len(caplog.records) == 1 and "512 MiB" in caplog.records[0].message
    left["bytes"] = 2**40
    answer(model, widths(17))
    assert capture.captured and capture.replayed


# ---------------------------------------------------------------- when


def test_auto_is_for_gpus_and_false_is_never(bodies):
    model = tiny_llama(seed=0)
    inputs = {**random_prompts(model, 1), **GREEDY}
    for graphs in ("auto", False):
        specfuse.generate(model, None, graphs=graphs, **inputs)
    assert not bodies


@pytest.mark.parametrize("bad", ["yes", None, 2, 1])
def test_graphs_is_auto_or_a_bool(bad):
    with pytest.raises(ValueError, match="graphs must be 'auto', True or False"):
        specfuse.SpeculativeGenerator(tiny_llama(seed=0), None, graphs=bad)


def windowed():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return MistralForCausalLM(MistralConfig(vocab_size=64, num_key_value_heads=1, sliding_window=6, **sizes))


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (windowed, {}, "sliding window"),
        (tiny_llama, {"repetition_penalty": 1.2}, "logits processors"),
        (tiny_llama, {"return_dict_in_generate": True, "output_logits": True}, "output_logits"),
    ],
)
def test_true_insists_and_says_what_stands_in_the_way(make, options, reason):
    model = make().eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 6, "do_sample": False, **options}
    with pytest.raises(ValueError, match=f"graphs=True, but .*{reason}"):
        specfuse.generate(model, None, graphs=True, **inputs)
    specfuse.generate(model, None, graphs="auto", **inputs)


def test_padding_with_holes_takes_the_usual_way(bodies):
    model = tiny_llama(seed=0)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 0, 1, 1, 1]]), **GREEDY}
    expected = specfuse.generate(model, None, graphs=False, **inputs)
    assert torch.equal(specfuse.generate(model, None, graphs=True, **inputs), expected) and not bodies


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "specfuse_tree"])
@pytest.mark.parametrize("batch", [1, 3])
def test_on_a_gpu_graphs_give_the_tokens_of_steps_without(attention, batch):
    model = tiny_llama(seed=1, dtype=torch.bfloat16, hidden=128).cuda()
    model.set_attn_implementation(attention)
    inputs = {name: x.cuda() for name, x in random_prompts(model, batch).items()}
    usual = specfuse.generate(model, None, graphs=False, **inputs, **GREEDY)
    right = usual[:, inputs["input_ids"].shape[1] :].tolist()
    for drafter in (None, OracleDrafter(right, 126), RandomTreeDrafter(126)):
        for _ in range(3):
            assert torch.equal(specfuse.generate(model, drafter, graphs=True, **inputs, **GREEDY), usual)
    assert step_graph._GRAPHS[model].free[batch].replays, "steps were captured"
    assert not step_graph._GRAPHS[model].told
