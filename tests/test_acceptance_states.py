"""Cosine and semantic acceptance: states of both models at the same place, bounds kept, fallbacks told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import random_prompts, tiny_llama

import specfuse
from specfuse import ModelDrafter
from specfuse.acceptance import (
    AgreementModel,
    CosineAcceptance,
    Judgement,
    SemanticAcceptance,
    TokenEmbedding,
)
from specfuse.acceptance.cosine import cosines_of, estimates, node_cosines
from specfuse.adapters import CompressionDrafter, CompressionDrafterConfig, LinearAdapter, ResidualMLPAdapter
from specfuse.cli.accept import lossy_line, parse_accept
from specfuse.cli.main import run
from specfuse.drafters import CombinedDrafter, DraftHead, HeadConfig, HeadDrafter


def answers(model, drafter, **kwargs):
    return specfuse.generate(model, drafter, max_new_tokens=24, return_dict_in_generate=True, **kwargs)


def sure(chance: float) -> AgreementModel:
    """An estimate that is the same everywhere."""
    return AgreementModel("constant", weights=[float(np.log(chance / (1 - chance)))])


class Spy(CosineAcceptance):
    """Never accepts; keeps what it saw."""

    def __init__(self):
        super().__init__(calibration=sure(0.5))
        self.seen = []

    def judge(self, scored):
        self.seen.append((scored, node_cosines(scored, None)))
        return Judgement()


@pytest.mark.parametrize("branching", [1, 2])
def test_states_of_both_models_are_those_of_the_same_text(branching):
    target, small = tiny_llama(seed=0, dtype=torch.float64), tiny_llama(seed=1, dtype=torch.float64)
    inputs = random_prompts(target, 2)
    noted = []

    class Noting(Spy):
        def judge(self, scored):
            for row, children in enumerate(scored.children):
                for node in [n for n, below in enumerate(children) if below]:
                    path = scored.path(row, node)
                    text = [*scored.state.prompts[row], *scored.state.answers[row], *path]
                    mine = scored.state.draft_states.of(row, path)
                    noted.append((text, mine.clone(), scored.target_states[row, node].clone()))
            return Judgement()

    answers(target, ModelDrafter(small, depth=3, branching=branching), accept=Noting(), **inputs)
    assert len(noted) > 20
    for text, mine, its in noted[::5]:
        ids = torch.tensor([text])
        for model, state in ((small, mine), (target, its)):
            with torch.no_grad():
                torch.testing.assert_close(state, model.model(ids).last_hidden_state[0, -1])


def test_the_same_model_twice_has_a_cosine_of_one_everywhere():
    model = tiny_llama(seed=0, dtype=torch.float32)
    spy = Spy()
    output = answers(model, ModelDrafter(model, depth=4, branching=2), accept=spy, **random_prompts(model, 2))
    cosines = [c for _, rows in spy.seen for row in rows for c in row.values()]
    assert len(cosines) > 20 and min(cosines) > 0.999, "states belong to the same place of the same text"
    assert output.acceptance["overruled"] == 0
    other = Spy()
    answers(model, ModelDrafter(tiny_llama(seed=1), depth=4), accept=other, **random_prompts(model, 2))
    assert max(c for _, rows in other.seen for row in rows for c in row.values()) < 0.9


def test_a_head_gives_its_states():
    model = tiny_llama(seed=0)
    config = HeadConfig(width=64, heads=4, vocabulary=128)
    torch.manual_seed(0)
    spy = Spy()
    drafter = HeadDrafter(DraftHead(config), model, depth=3, min_prob=0.0, level_prob=0.0)
    answers(model, drafter, accept=spy, **random_prompts(model, 2))
    deep = [node for _, rows in spy.seen for row in rows for node in row if node]
    assert deep, "also behind drafted tokens"


def test_cosines_are_those_of_the_module():
    torch.manual_seed(0)
    x, y = torch.randn(5, 24), torch.randn(5, 32)
    padded = F.pad(x, (0, 8))
    assert torch.allclose(cosines_of(x, y, None), F.cosine_similarity(padded, y), atol=1e-6)
    linear, residual = LinearAdapter(24, 32), ResidualMLPAdapter(32, 8)
    torch.nn.init.normal_(residual.up.weight)
    assert torch.allclose(cosines_of(x, y, linear), F.cosine_similarity(linear(x), y), atol=1e-5)
    assert torch.allclose(cosines_of(x, y, residual), F.cosine_similarity(residual(padded), y), atol=1e-5)


def test_the_bound_is_on_the_product_over_a_pass():
    target, small = tiny_llama(seed=0, eos=False), tiny_llama(seed=1, eos=False)
    inputs = random_prompts(target, 1)
    plain = answers(target, None, **inputs)
    drafter = ModelDrafter(small, depth=4)
    # 0.95 each: one token against the target in a pass with a bound of 0.06, two with 0.1, none with 0.04.
    told = {}
    for bound in (0.04, 0.06, 0.1):
        output = answers(
            target, drafter, accept=CosineAcceptance(None, sure(0.95), max_disagreement=bound), **inputs
        )
        told[bound] = output
    assert torch.equal(told[0.04].sequences, plain.sequences) and told[0.04].acceptance["overruled"] == 0
    assert not torch.equal(told[0.06].sequences, plain.sequences)
    per_pass = {bound: max(output.stats.histogram) for bound, output in told.items()}
    assert per_pass[0.06] < per_pass[0.1]
    label = told[0.1].acceptance
    assert label["trusted"]["estimated_agreement"] == pytest.approx(0.95)
    assert label["trusted"]["measured_agreement"] < 0.5, (
        "these models have nothing in common: measured, not believed"
    )
    assert label["settings"]["max_disagreement"] == 0.1 and label["lossless"] is False
    json.dumps(label)


def test_a_threshold_needs_no_calibration():
    target, small = tiny_llama(seed=0, eos=False), tiny_llama(seed=1, eos=False)
    inputs = random_prompts(target, 2)
    loose = answers(target, ModelDrafter(small), accept=CosineAcceptance(threshold=-1.0), **inputs)
    strict = answers(target, ModelDrafter(small), accept=CosineAcceptance(threshold=1.0), **inputs)
    assert loose.acceptance["overruled"] > 0 == strict.acceptance["overruled"]
    assert torch.equal(strict.sequences, answers(target, None, **inputs).sequences)
    assert "trusted" not in loose.acceptance


def test_estimates_use_the_chance_of_a_child_given_its_parent():
    model = tiny_llama(seed=0)
    spy = Spy()
    answers(model, ModelDrafter(model, depth=3), accept=spy, **random_prompts(model, 1))
    scored, cosines = next(each for each in spy.seen if each[0].tree.width == 4)
    rises = AgreementModel("draft", weights=[0.0, 1.0])
    found = estimates(scored, cosines, rises)[0]
    probs = scored.tree.probs[0]
    for node in (1, 2, 3):
        assert found[node] == pytest.approx(min(float(probs[node] / probs[node - 1]), 0.9999), rel=1e-3)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"give either calibration .* got neither"):
        CosineAcceptance()
    with pytest.raises(ValueError, match="got both"):
        CosineAcceptance(calibration=sure(0.5), threshold=0.5)
    for bad in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="max_disagreement must lie"):
            CosineAcceptance(calibration=sure(0.5), max_disagreement=bad)
    with pytest.raises(ValueError, match="threshold must lie"):
        CosineAcceptance(threshold=2.0)
    with pytest.raises(ValueError, match="adapter must be one of"):
        CosineAcceptance(
            CompressionDrafter(CompressionDrafterConfig(features=8, vocab_size=16, width=64, heads=2)),
            sure(0.5),
        )
    model = tiny_llama()
    with pytest.raises(ValueError, match="align calibrate"):
        answers(model, None, accept="cosine", **random_prompts(model, 1))
    combined = CombinedDrafter([ModelDrafter(model)])
    with pytest.raises(ValueError, match="CombinedDrafter has none"):
        answers(model, combined, accept=CosineAcceptance(threshold=0.5), **random_prompts(model, 1))


def test_a_calibration_of_another_kind_of_drafter_is_refused():
    model, calibration = tiny_llama(), sure(0.9)
    calibration.about = {"drafter": "EventDrafter"}
    with pytest.raises(ValueError, match="made for EventDrafter, not for ModelDrafter"):
        answers(
            model, ModelDrafter(model), accept=CosineAcceptance(None, calibration), **random_prompts(model, 1)
        )


def test_a_calibration_is_found_beside_its_adapter(tmp_path):
    calibration = sure(0.9)
    calibration.about = {"adapter": "residual-mlp"}
    ResidualMLPAdapter(32, 8).save_pretrained(tmp_path)
    calibration.save(tmp_path)
    rule = CosineAcceptance.from_pretrained(tmp_path, max_disagreement=0.2)
    assert rule.settings() == {"adapter": "residual-mlp", "calibration": "constant", "max_disagreement": 0.2}
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="adapter cannot be loaded"):
        CosineAcceptance.from_pretrained(tmp_path)


class Words:
    """A tokenizer of whole words and of pieces that go on with one (without a space in front)."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids, **_):
        return "".join(self.pieces.get(i, f" w{i}") for i in ids)

    def __call__(self, text, **_):
        back = {piece.strip(): i for i, piece in self.pieces.items()}
        return {"input_ids": [back.get(word, 0) for word in text.split()]}


def phrase(tokens, picks, embed, pieces=None, ends=frozenset(), **options):
    """Nodes that the rule accepts behind the root of a chain of drafts."""
    from specfuse.acceptance.rule import ScoredTree, Tally
    from specfuse.drafters import DraftState
    from specfuse.tree import TokenTree

    tree = TokenTree.from_chains([1], [tokens])
    children = [[[i + 1] for i in range(len(tokens))] + [[]]]
    state = DraftState([[1]], [[9, 8]], [True], [50])
    scored = ScoredTree(
        torch.zeros(1, len(tokens) + 1, 4),
        0.0,
        tree,
        [[1, *tokens]],
        [picks],
        children,
        None,
        state,
        Tally(),
        ends,
    )
    rule = SemanticAcceptance(Words(pieces or {}), embed, **options)
    return rule.judge(scored).overrule(0, [0])


def alike(texts):
    return torch.ones(len(texts), 3)


def unlike(texts):
    return torch.eye(len(texts), 3)


def test_a_phrase_stands_until_draft_and_target_meet_again():
    # Draft 20 21 22 23; the target would say 30 31, then 22 as drafted.
    assert phrase([20, 21, 22, 23], [30, 31, 22, 23, 5], alike) == [1, 2]
    assert phrase([20, 21, 22, 23], [30, 31, 22, 23, 5], unlike) == []
    assert phrase([20, 21], [30, 31, 22], alike) == [], "they do not meet within the draft"
    assert phrase([20, 21, 22, 23], [30, 31, 22, 23, 5], alike, longest=1) == []


def test_a_phrase_ends_with_a_word():
    pieces = {22: "ing"}
    assert phrase([20, 21, 22, 23], [30, 31, 22, 23, 5], alike, pieces) == [1, 2, 3]


def test_a_phrase_never_holds_an_end():
    assert phrase([20, 21, 22], [30, 31, 22, 5], alike, ends=frozenset({31})) == []
    assert phrase([20, 21, 22], [30, 31, 22, 5], alike, ends=frozenset({21})) == []


def test_phrases_are_embedded_with_words_in_front():
    seen = []

    def embed(texts):
        seen.append(texts)
        return alike(texts)

    phrase([20, 22], [30, 22, 5], embed)
    assert seen == [["w9 w8 w20", "w9 w8 w30"]]


def test_without_an_embedding_the_answer_is_exact_and_says_why():
    target, small = tiny_llama(seed=0), tiny_llama(seed=1)
    inputs = random_prompts(target, 1)
    output = answers(target, ModelDrafter(small), accept=SemanticAcceptance(Words({}), None), **inputs)
    assert torch.equal(output.sequences, answers(target, None, **inputs).sequences)
    assert "no sentence embedding" in output.acceptance["fallback"]
    assert "Exact after all" in lossy_line(output.acceptance)


def test_semantic_names_bad_arguments():
    with pytest.raises(ValueError, match="threshold must lie"):
        SemanticAcceptance(None, alike, threshold=1.5)
    with pytest.raises(ValueError, match="longest must be"):
        SemanticAcceptance(None, alike, longest=0)
    with pytest.raises(ValueError, match="embed must be callable"):
        SemanticAcceptance(None, 3)
    with pytest.raises(ValueError, match="embed must return"):
        phrase([20, 22], [30, 22, 5], lambda texts: [1.0])


def test_token_embeddings_know_the_same_words():
    embed = TokenEmbedding(tiny_llama(), Words({5: " car", 6: " road", 7: " tree"}))
    one, same, other, empty = embed(["car road", "road car", "tree", ""])
    assert torch.allclose(one, same, atol=1e-6) and F.cosine_similarity(one, other, dim=0) < 0.9
    assert not empty.any()


def test_the_command_line_names_rules():
    assert parse_accept("typical", 0.1, None, None).name == "typical"
    with pytest.raises(ValueError, match="calibrate"):
        parse_accept("cosine", 0.1, None, None)
    with pytest.raises(ValueError, match="must be exact"):
        parse_accept("anything", 0.1, None, None)
    label = {"rule": "typical", "lossless": False, "tokens": 20, "overruled": 3, "measured_agreement": 0.85}
    assert lossy_line(label).startswith("LOSSY: 3 of 20 tokens")
    assert run(["align", "calibrate"]) == 2 and run(["align", "other"]) == 2


def test_exact_asks_no_drafter_for_states():
    model = tiny_llama()
    asked = []

    class Watching(ModelDrafter):
        def propose(self, state, max_nodes):
            asked.append(state.draft_states)
            return super().propose(state, max_nodes)

    answers(model, Watching(model), **random_prompts(model, 1))
    assert asked and not any(asked)
