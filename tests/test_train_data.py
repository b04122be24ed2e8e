"""What training reads: clips on disk, labels, and inputs that are those of VideoLlavaProcessor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from specfuse.data.world import clip, score, split
from specfuse.data.world.score import READINGS
from specfuse.session import FIRST_TURN
from specfuse.train.batches import IGNORED, pixels, prompt_end, prompt_start, rows
from specfuse.train.build import FRAME_TOKENS, VIDEO_TOKENS, build_processor
from specfuse.train.clip_store import Clips, load_clips
from specfuse.train.labels import CENTRES, FACTS, SHOWN, UNKNOWN
from specfuse.train.language import LanguageBatches
from specfuse.train.presets import preset
from specfuse.train.tokenizer import PROMPT, train_tokenizer


@pytest.fixture(scope="module")
def cache(world_cache: Path) -> Path:
    return world_cache


@pytest.fixture(scope="module")
def clips(cache: Path) -> Clips:
    return load_clips([5, 2, 9], cache)


@pytest.fixture(scope="module")
def tokenizer(clips: Clips):
    return train_tokenizer((q for asked in clips.questions for q in asked), 500)


def test_clips_come_back_from_disk_as_they_were_drawn(cache: Path, clips: Clips) -> None:
    again = load_clips([5, 2, 9], cache)
    for drawn, read in zip(clips, again, strict=True):
        assert np.array_equal(drawn, read) if isinstance(drawn, np.ndarray) else drawn == read
    for place, index in enumerate((5, 2, 9)):
        assert np.array_equal(clips.frames[place], clip(index).frames)
        assert clips.questions[place] == clip(index).questions


def test_a_broken_block_is_drawn_again(tmp_path: Path, clips: Clips) -> None:
    load_clips([2], tmp_path)
    (block,) = tmp_path.iterdir()
    for damage in (b"", b"not a zip archive", block.read_bytes()[:5000]):
        block.write_bytes(damage)
        assert np.array_equal(load_clips([2], tmp_path).frames[0], clips.frames[1])
    assert list(tmp_path.iterdir()) == [block]


def test_facts_are_the_answers_to_the_questions(clips: Clips) -> None:
    for facts, questions in zip(clips.facts, clips.questions, strict=True):
        named = dict(zip(FACTS, facts.tolist(), strict=True))
        for question in questions:
            if question.kind in named:
                assert list(READINGS[question.kind])[named[question.kind]] == question.answer
        asked = {question.kind for question in questions} | {"signal"}
        assert all((kind in asked) == (named[kind] != UNKNOWN) for kind in FACTS if kind in READINGS)


def test_patches_show_what_is_seen_where_it_is_seen() -> None:
    found = 0
    for index in split("held_out")[:6].tolist():
        one = clip(index)
        # A fresh label, not one from disk.
        from specfuse.train.labels import patch_labels

        labels = patch_labels(one)
        for thing in one.view.seen:
            column = int((thing.columns[4] + 0.5) * 8)
            near = [p for p in range(64) if abs(p % 8 - column) <= 1]
            centres = labels[4, near, 1]
            found += 1
            assert 1 + CENTRES.index(thing.kind) in centres, f"clip {index}: {thing.kind} at {column}"
            if thing.kind in ("car", "truck"):
                assert 1 + SHOWN.index(f"{thing.colour} {thing.kind}") in labels[4, near, 0]
    assert found > 10


def test_pixels_are_those_of_the_processor(clips: Clips, tokenizer) -> None:
    frames = clips.frames[0]
    wanted = build_processor(tokenizer)(text="<video>", videos=frames, return_tensors="pt")
    torch.testing.assert_close(pixels(frames)[None], wanted["pixel_values_videos"], atol=2e-5, rtol=0)


def test_the_prompt_is_that_of_inference() -> None:
    assert PROMPT == FIRST_TURN


def test_rows_continue_the_tokens_of_the_processor(clips: Clips, tokenizer) -> None:
    processor = build_processor(tokenizer)
    start = prompt_start(tokenizer)
    assert start.count(tokenizer.convert_tokens_to_ids("<video>")) == VIDEO_TOKENS
    asked = clips.questions[0]
    text = rows(tokenizer, asked)
    for question, ids, targets, weights in zip(asked, *text, strict=True):
        whole = PROMPT.format(question=question.text) + " " + question.long + "</s>"
        wanted = processor(text=whole, videos=clips.frames[0], return_tensors="pt").input_ids[0].tolist()
        said = targets != IGNORED
        length = len(wanted) - len(start) - 1
        assert start + ids[:length].tolist() + [tokenizer.eos_token_id] == wanted
        assert (ids[length:] == tokenizer.pad_token_id).all()
        # What is predicted is the answer with </s>, each token one place after its input.
        assert tokenizer.decode(targets[said]) == f" {question.long}</s>"
        assert torch.equal(targets[said][:-1], ids[:length][said[:length]][1:])
        assert ((weights > 0) == said).all()
        first = tokenizer.decode(targets[weights > 1]).strip()
        assert first == (question.long.partition(". ")[0].rstrip(".") if question.factual else "")
    assert (
        prompt_end(tokenizer, asked[0].text)
        == text.ids[0, : len(prompt_end(tokenizer, asked[0].text))].tolist()
    )


def test_rows_of_facts_end_with_the_fact(clips: Clips, tokenizer) -> None:
    asked = [question for question in clips.questions[0] if question.factual]
    text = rows(tokenizer, asked, facts_only=True)
    for question, targets in zip(asked, text.targets, strict=True):
        said = tokenizer.decode(targets[targets != IGNORED]).strip()
        assert said == question.long.partition(". ")[0].rstrip(".") + "."
        assert score(question, said)


def test_batches_depend_on_seed_and_step_alone(clips: Clips, tokenizer) -> None:
    first, second = (LanguageBatches(tokenizer, clips, preset("micro"), seed=1) for _ in range(2))
    for facts_only in (False, True):
        chosen, text = first.at(7, facts_only=facts_only)
        again, same = second.at(7, facts_only=facts_only)
        assert chosen == again and torch.equal(text.ids, same.ids)
        micro = preset("micro")
        assert len(text.ids) == len(chosen) * (micro.fact_questions if facts_only else micro.questions)
    assert not torch.equal(first.at(7)[1].ids, first.at(8)[1].ids)


def test_steps_read_more_and_more_of_every_frame(clips: Clips, tokenizer) -> None:
    micro = preset("micro")
    batches = LanguageBatches(tokenizer, clips, micro, seed=1)
    counts = []
    for share in (0.0, 0.25, 0.49):
        kept = batches.kept(3, share)
        assert kept is not None and torch.equal(kept, batches.kept(3, share))
        assert torch.equal(kept, kept.unique()) and kept.max() < VIDEO_TOKENS
        assert set(range(0, VIDEO_TOKENS, FRAME_TOKENS)) <= set(kept.tolist()), "all class tokens"
        counts.append(len(kept) // 8 - 1)
    assert counts[0] == micro.least_patches and counts == sorted(set(counts))
    assert not torch.equal(batches.kept(3, 0.0), batches.kept(4, 0.0))
    assert batches.kept(3, micro.sparse_share) is None


@pytest.mark.parametrize("text", ["", "Is it day?", "Straße 東京 \n\t 😀", "<video> in a question"])
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
