"""Small models of transformers' generative classes say with specfuse what ``model.generate`` says."""

from __future__ import annotations

import time

import pytest
from families import table as tables
from families.build import SCALES, build, classes, randomize, small_config
from families.compare import Comparison, Outcome, compare, is_refusal, summed_up
from families.prompts import text_prompts

import specfuse
from specfuse.passes.kv_cache import TreeCache

# What a class may come out as: a few of each kind of decoder.
REPRESENTATIVE = {
    "LlamaForCausalLM": {"equal"},
    "MistralForCausalLM": {"equal"},
    "Gemma3ForCausalLM": {"equal"},
    "GPT2LMHeadModel": {"equal"},
    "MixtralForCausalLM": {"equal"},
    "DeepseekV3ForCausalLM": {"equal"},
    "LlavaForConditionalGeneration": {"equal"},
    "Gemma3ForConditionalGeneration": {"equal", "plain only"},
    "Qwen2VLForConditionalGeneration": {"equal", "plain only"},
    "PaliGemmaForConditionalGeneration": {"equal", "plain only"},
    "Gemma3nForCausalLM": {"equal", "plain only", "refused"},
    "GPTNeoForCausalLM": {"equal", "plain only", "refused"},
    "OpenAIGPTLMHeadModel": {"plain only", "refused"},
    "MambaForCausalLM": {"plain only", "refused"},
    "BartForConditionalGeneration": {"plain only", "refused"},
}


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_class_is_equal_or_refused(name: str) -> None:
    known = classes()
    if name not in known:
        pytest.skip(f"this transformers has no {name}")
    outcome = compare(name, known[name][0])
    assert outcome.outcome in REPRESENTATIVE[name], outcome.detail
    assert (outcome.accepted > 0) == (outcome.outcome == "equal")
    assert {"short", "long", "padded"} <= set(outcome.prompts)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_class_is_wrong() -> None:
    found = list(tables.outcomes(classes(), jobs=2))
    bad = [f"{o.name}: {o.outcome}: {o.detail}" for o in found if o.outcome in ("wrong", "error")]
    assert not bad, "\n".join(bad)
    compared = [o for o in found if o.outcome not in ("not built", "not comparable")]
    assert len(compared) >= 200


def test_pixels_are_part_of_the_comparison() -> None:
    outcome = compare("LlavaForConditionalGeneration", "llava")
    assert "pixels" in outcome.prompts, outcome.detail


def test_forgotten_accepted_path_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TreeCache, "keep_path", lambda *arguments: None)
    outcome = compare("LlamaForCausalLM", "llama")
    assert outcome.outcome == "wrong"
    assert "parts at answer token" in outcome.detail


def test_models_are_the_same_every_time() -> None:
    first, second = (build("LlamaForCausalLM", "llama") for _ in range(2))
    for model in (first, second):
        randomize(model, *SCALES[0])
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert a.equal(b)


def test_every_kind_of_layer_is_kept() -> None:
    config = small_config("Gemma3ForCausalLM", "gemma3_text")
    assert set(config.layer_types) == {"full_attention", "sliding_attention"}
    assert config.num_hidden_layers == len(config.layer_types) == 2


def test_class_that_hangs_does_not_stop_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "compare", lambda name, model_type: time.sleep(60))
    begin = time.monotonic()
    outcome = tables.in_process("LlamaForCausalLM", "llama", seconds=0.5)
    assert (outcome.outcome, outcome.detail) == ("error", "no result after 0 s")
    assert time.monotonic() - begin < 30


def test_refusal_names_class_or_argument_and_comes_from_specfuse() -> None:
    model = build("LlamaForCausalLM", "llama")
    assert not is_refusal(ValueError("model LlamaForCausalLM has no cache"), model)  # raised by nobody

    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError) as caught:
        specfuse.generate(model, None, **text_prompts(model)[0].inputs)
    assert is_refusal(caught.value, model)


def test_worst_comparison_decides() -> None:
    def outcome(*verdicts: str) -> str:
        found = [Comparison("short", "tree", verdict, accepted=3) for verdict in verdicts]
        return summed_up(Outcome("A", "a", "", comparisons=found), []).outcome

    assert outcome("equal", "equal") == "equal"
    assert outcome("equal", "error", "wrong") == "wrong"
    assert outcome("equal", "error", "refused") == "error"
    assert outcome("refused") == "refused"
    assert outcome() == "not comparable"


def test_table_tells_every_row() -> None:
    found = [Outcome("A", "a", "equal", "", ["short"], 7), Outcome("B", "b", "not built", "a | b")]
    text = tables.table(found)
    assert "| A | equal | short | 7 |  |" in text
    assert "| B | not built |  | 0 | a \\| b |" in text


def test_unknown_class_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tables.main(["--only", "NoSuchModel"])
    assert "NoSuchModel" in capsys.readouterr().err
