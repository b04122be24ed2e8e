"""A drafter with another vocabulary: the target's tokens in any case, and drafts that are really accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import left_pad, tiny_llama, tiny_video_llava
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from vocabulary_cases import (
    FAMILIES,
    OTHER_TEXT,
    asked,
    dialogue,
    parrot,
    permuted,
    permuted_model,
    tokenizer,
)

import specfuse
from specfuse import ModelDrafter
from specfuse.drafters.base import DraftState
from specfuse.drafters.pieces import Pieces, whole_characters
from specfuse.drafters.vocabulary import Intersection, Strings, shared, vocabulary_for

GREEDY = {"max_new_tokens": 48, "do_sample": False}
PAIRS = [(a, FAMILIES[(i + step) % len(FAMILIES)]) for i, a in enumerate(FAMILIES) for step in (1, 2)]


def drafter_for(target: str, drafter: str, kind: str, model: Any = None, **options: Any) -> ModelDrafter:
    tokenizers = {"tokenizer": tokenizer(drafter), "target_tokenizer": tokenizer(target)}
    return ModelDrafter(model or parrot(drafter), vocabulary=kind, **tokenizers, **options)


def tokens_per_pass(family: str, drafter: Any, **options: Any) -> float:
    """Over the known questions; every answer is compared."""
    generator = specfuse.SpeculativeGenerator(parrot(family), drafter)
    tokens = passes = 0
    for index in range(2):
        inputs = asked(family, index) | (options or GREEDY)
        found = generator.generate(**inputs)
        assert torch.equal(found, specfuse.generate(parrot(family), None, **inputs))
        tokens += generator.last_stats.tokens
        passes += generator.last_stats.passes
    return tokens / passes


# ---------------------------------------------------------------- pieces


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_spell_the_text(family: str) -> None:
    pieces = Pieces(tokenizer(family))
    question, answer = dialogue()[0]
    # WordPiece puts spaces around some punctuation, and between signs of Chinese.
    for text in (answer[:60],) if family == "wordpiece" else (answer, f" {OTHER_TEXT}"):
        assert pieces.spell([1, *pieces.first(text.encode()), 2]).decode() == text
    for cut in range(2, 40):  # also in the middle of words
        before, text = (question + answer[:cut]).encode(), answer[cut : cut + 15].encode()
        # A space alone is no piece of WordPiece's.
        assert pieces.spell(pieces.after(before, text)) in (text, text.rstrip())
    whole = pieces.after(question.encode(), answer[:60].encode())
    assert whole == tokenizer(family).encode(question + answer[:60])[-len(whole) :]


@given(st.text(max_size=12), st.integers(0, 40))
@settings(deadline=None, max_examples=60)
def test_any_text_behind_any_other(text: str, cut: int) -> None:
    wanted = text.encode("utf-8", "ignore")
    pieces = Pieces(tokenizer("bytes"))
    assert pieces.spell(pieces.after(OTHER_TEXT.encode()[:cut], wanted)) == wanted


def test_what_can_not_be_spelled_ends_the_text() -> None:
    pieces = Pieces(tokenizer("wordpiece"))
    assert pieces.spell(pieces.after(b"the", " car \u5317 left".encode())) in (b" car", b" car ")


@given(st.text(max_size=6), st.integers(0, 8))
@settings(deadline=None, max_examples=100)
def test_whole_characters(text: str, cut: int) -> None:
    encoded = text.encode("utf-8", "ignore")
    kept = whole_characters(encoded[:cut])
    assert kept.decode() == encoded[:cut].decode(errors="ignore")


# ---------------------------------------------------------------- which way


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_compares(family: str) -> None:
    mine = tokenizer(family)
    assert vocabulary_for("auto", mine, mine, 700).kind == "same"
    assert vocabulary_for("auto", mine, permuted(family), 700).kind == "intersection"
    for other in FAMILIES:
        if other != family:
            assert vocabulary_for("auto", mine, tokenizer(other), 700).kind == "string"
            assert shared(Pieces(mine), Pieces(tokenizer(other))) < 0.9


def test_same_names_that_read_differently_are_not_the_same() -> None:
    other = tokenizer("wordpiece").__class__(
        tokenizer_object=tokenizer("wordpiece").backend_tokenizer.from_str(
            tokenizer("wordpiece").backend_tokenizer.to_str().replace('"prefix":"##"', '"prefix":"@@"')
        ),
        bos_token="<s>",
        eos_token="</s>",
    )
    assert other.get_vocab() == tokenizer("wordpiece").get_vocab()
    assert vocabulary_for("auto", tokenizer("wordpiece"), other, 300).kind != "same"


# ---------------------------------------------------------------- the target's tokens


@pytest.mark.parametrize("kind", ["intersection", "string"])
@pytest.mark.parametrize(("target", "drafter"), PAIRS[::2])
def test_random_models_say_what_the_target_says(target: str, drafter: str, kind: str) -> None:
    model = tiny_llama(seed=4, vocab=len(tokenizer(target)))
    other = tiny_llama(seed=5, vocab=len(tokenizer(drafter)) + 3, layers=1)
    rows = [tokenizer(target).encode(text)[:20] for text, _ in dialogue()[:2]] + [[5, 6]]
    inputs = left_pad(rows) | {"max_new_tokens": 20}
    draft = drafter_for(target, drafter, kind, other, depth=3, branching=2)
    found = specfuse.generate(model, draft, **inputs, do_sample=False)
    assert torch.equal(found, model.generate(**inputs, do_sample=False))
    for options in ({"temperature": 0.7}, {"top_k": 5}, {"repetition_penalty": 1.3}):
        sampled = inputs | {"do_sample": True, "seed": 3} | options
        assert torch.equal(
            specfuse.generate(model, draft, **sampled), specfuse.generate(model, None, **sampled)
        )


# ---------------------------------------------------------------- drafting works


@pytest.mark.parametrize("family", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("sampled", [False, True])
def test_other_ids_cost_nothing(family: str, sampled: bool) -> None:
    """Through permuted ids a model drafts for itself as well as without."""
    options = {"max_new_tokens": 48, "do_sample": True, "temperature": 1.5, "seed": 1} if sampled else {}
    model = permuted_model(parrot(family), family)
    names = {"tokenizer": permuted(family), "target_tokenizer": tokenizer(family)}
    mapped = ModelDrafter(model, **names)
    assert isinstance(mapped.vocabulary, Intersection)
    wanted = tokens_per_pass(family, ModelDrafter(parrot(family)), **options)
    assert wanted > 4
    assert tokens_per_pass(family, mapped, **options) == wanted
    moved = mapped.vocabulary.theirs
    mapped.vocabulary.to_target = dict(
        zip(mapped.vocabulary.ours.tolist(), moved.roll(7).tolist(), strict=True)
    )
    assert tokens_per_pass(family, mapped, **options) < 1.2


@pytest.mark.parametrize(("target", "drafter"), PAIRS[::2])
def test_another_tokenization_is_accepted(target: str, drafter: str) -> None:
    draft = drafter_for(target, drafter, "string")
    assert tokens_per_pass(target, draft) > 2.5
    assert isinstance(draft.vocabulary, Strings)
    pieces = draft.vocabulary.drafter
    text = [token for token, piece in enumerate(pieces.spelled) if piece]
    shuffled = list(pieces.spelled)
    for token, other in zip(text, text[7:] + text[:7], strict=True):
        shuffled[token] = pieces.spelled[other]
    draft.vocabulary.drafter = Pieces(pieces.tokenizer)
    draft.vocabulary.drafter.spelled = shuffled
    assert tokens_per_pass(target, draft) < 1.35


def test_a_tree_in_another_tokenization() -> None:
    chain = tokens_per_pass("wordpiece", drafter_for("wordpiece", "bytes", "string"))
    tree = tokens_per_pass("wordpiece", drafter_for("wordpiece", "bytes", "string", branching=3))
    assert tree >= chain > 3


def test_sampled_text_is_drafted_with_the_targets_noise() -> None:
    options = {"max_new_tokens": 48, "do_sample": True, "temperature": 1.0, "seed": 2}
    draft = drafter_for("bytes", "sentencepiece", "string")
    assert tokens_per_pass("bytes", draft, **options) > 3


def test_the_intersection_takes_what_is_there() -> None:
    assert tokens_per_pass("bytes", drafter_for("bytes", "wordpiece", "intersection")) > 2.5


@pytest.mark.parametrize(("target", "drafter"), [("fewer bytes", "sentencepiece"), ("unigram", "bytes")])
def test_a_cache_that_was_cut_back_is_as_good_as_new(target: str, drafter: str) -> None:
    prompt = asked(target)["input_ids"][0].tolist()
    answer = tokenizer(target).encode(dialogue()[0][1])

    def state_after(count: int) -> DraftState:
        return DraftState(
            prompts=[prompt],
            answers=[answer[:count]],
            active=[True],
            remaining=[60],
            inputs={"input_ids": torch.tensor([prompt])},
        )

    draft, cut = drafter_for(target, drafter, "string", depth=3), 0
    used = state_after(0)
    for count in range(0, 24):
        used.answers[0][:] = answer[:count]
        before = list(used.memory[id(draft)].fed[0]) if used.memory else []
        grown = draft.propose(used, 16)
        fed = used.memory[id(draft)].fed[0]
        cut += fed[: len(before)] != before
        assert grown.tokens.tolist() == draft.propose(state_after(count), 16).tokens.tolist()
    assert cut > 0


@pytest.mark.parametrize("kind", ["intersection", "string"])
def test_in_the_middle_of_a_character(kind: str) -> None:
    ids = tokenizer("bytes").encode(" Grüße 🚜!")
    pieces = Pieces(tokenizer("bytes"))
    draft = drafter_for("bytes", "sentencepiece", kind)
    seen = 0
    for count in range(len(ids) + 1):
        text = pieces.spell(ids[:count])
        state = DraftState(
            prompts=[[1, 40]],
            answers=[ids[:count]],
            active=[True],
            remaining=[9],
            inputs={"input_ids": torch.tensor([[1, 40]])},
        )
        tree = draft.propose(state, 8)
        if kind == "string" and whole_characters(text) != text:
            seen += 1
            assert tree.width == 1
    assert seen > 0 or kind == "intersection"
    follows = draft.vocabulary.drafter.spell(draft.vocabulary.follow(state, 0, []))
    assert follows == " Grüße 🚜!".encode()


def test_the_end_is_the_targets() -> None:
    """Drafted to the end, the answer takes no pass for its last token."""
    index = min(range(2), key=lambda i: len(dialogue()[i][1]))
    generator = specfuse.SpeculativeGenerator(
        parrot("unigram"), drafter_for("unigram", "bytes", "string", depth=120), max_nodes=300
    )
    found = generator.generate(**asked("unigram", index), max_new_tokens=200, do_sample=False)
    assert found[0, -1] == tokenizer("unigram").eos_token_id
    assert generator.last_stats.passes <= 3 < 20 < generator.last_stats.tokens


# ---------------------------------------------------------------- mistakes


def test_wrong_vocabularies_are_named() -> None:
    mine = tokenizer("bytes")
    for kind, target, drafter, message in (
        ("other", mine, mine, "vocabulary must be one of auto, same, intersection, string, got 'other'"),
        ("string", None, mine, "target_tokenizer is missing"),
        ("auto", mine, None, "tokenizer is missing"),
        ("intersection", None, None, "is missing"),
        ("auto", mine, 7, "tokenizer must be a transformers tokenizer, got int"),
        ("same", mine, permuted("bytes"), "of the target's 700 tokens are others to the drafter, first "),
    ):
        with pytest.raises(ValueError, match=message):
            vocabulary_for(kind, target, drafter, 700)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "\u6771\u4eac": 1, "word": 2}, unk_token="<unk>"))
    foreign = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(ValueError, match="needs tokens that both vocabularies spell alike; there is none"):
        vocabulary_for("intersection", mine, foreign, 3)
    assert vocabulary_for("auto", mine, foreign, 3).kind == "string"


def test_pixels_need_a_prompt_of_their_own() -> None:
    model = tiny_video_llava(vocab=128)
    draft = ModelDrafter(model, tokenizer=tokenizer("bytes"), target_tokenizer=tokenizer("unigram"))
    inputs = {"input_ids": torch.tensor([[1, 127]]), "pixel_values_videos": torch.ones(1)}
    state = DraftState([[1, 127]], [[]], [True], [9], frozenset({127}), inputs)
    with pytest.raises(ValueError, match=r"sees pixels and has another vocabulary: pass draft_inputs=\.\.\."):
        draft.propose(state, 4)
