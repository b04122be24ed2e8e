"""The driving world's scenes: the same from the same seed, split by drive, honest about what is visible."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world_cases import sample

from specfuse.data.world import clip, split
from specfuse.data.world.render import render
from specfuse.data.world.sample import sample_scene
from specfuse.data.world.scene import SCENERY
from specfuse.data.world.splits import NUM_CLIPS, drive_of, drives
from specfuse.data.world.visible import (
    CLEAR_FRAMES,
    CLEAR_PIXELS,
    DOUBTFUL,
    HIDDEN_PIXELS,
    build_scene,
    survey,
    verdict,
)

INDICES = st.integers(0, NUM_CLIPS - 1)


def test_splits_have_the_sizes_of_the_study_and_share_no_drive() -> None:
    train, held_out = split("train"), split("held_out")
    assert (len(train), len(held_out)) == (4166, 1042)
    assert np.array_equal(np.union1d(train, held_out), np.arange(5208))
    assert not {drive_of(int(i)) for i in train} & {drive_of(int(i)) for i in held_out}


@pytest.mark.parametrize("seed", [0, 1, 7, 2**32])
def test_every_world_has_these_sizes(seed: int) -> None:
    assert (len(split("train", seed)), len(split("held_out", seed))) == (4166, 1042)
    table = drives(seed)
    assert table.length.min() >= 4 and table.length.max() <= 8 and table.length.sum() == 5208
    assert np.array_equal(table.first, np.cumsum(table.length) - table.length)


def test_drive_of_agrees_with_the_table() -> None:
    table = drives()
    expected = np.repeat(np.arange(len(table.first)), table.length)
    assert [drive_of(i) for i in range(0, 5208, 7)] == expected[::7].tolist()


def test_clips_of_a_drive_share_the_place() -> None:
    table = drives()
    differing = Counter()
    for drive in range(0, len(table.first), 40):
        first, length = int(table.first[drive]), int(table.length[drive])
        scenes = [sample_scene(i) for i in range(first, first + length)]
        assert len({(s.drive, s.road, s.weather, s.light, s.look) for s in scenes}) == 1
        differing[len({s.things for s in scenes}) > 1] += 1
    assert differing[True] > differing[False], "clips of a drive are not copies"


@settings(max_examples=15, deadline=None)
@given(INDICES)
def test_the_same_seed_gives_the_same_scene(index: int) -> None:
    first = build_scene.__wrapped__(index)
    assert build_scene.__wrapped__(index) == first
    assert sample_scene(index, 1) != sample_scene(index, 2)


@settings(max_examples=25, deadline=None)
@given(INDICES)
def test_clear_and_hidden_are_decided_by_pixels(index: int) -> None:
    scene, view = build_scene(index)
    owner = render(scene).owner
    clear = {seen.index for seen in view.seen}
    for i, thing in enumerate(scene.things):
        pixels = (owner == i).sum((1, 2))
        if i in clear:
            assert (pixels >= CLEAR_PIXELS[thing.kind]).sum() >= CLEAR_FRAMES, thing
        elif thing.kind not in SCENERY:
            assert pixels.max() <= HIDDEN_PIXELS, thing


def test_some_things_exist_and_cannot_be_seen() -> None:
    covered = tiny = 0
    for example in sample():
        pictures = survey(example.scene)
        for i, thing in enumerate(example.scene.things):
            if thing.kind in CLEAR_PIXELS and pictures.visible[i].max() <= HIDDEN_PIXELS:
                covered += pictures.drawn[i].max() > HIDDEN_PIXELS
                tiny += pictures.drawn[i].max() <= HIDDEN_PIXELS
    assert covered > 5 and tiny > 5


def test_what_is_hidden_appears_when_nothing_stands_in_front() -> None:
    for example in sample():
        scene = example.scene
        pictures = survey(scene)
        for i, thing in enumerate(scene.things):
            if (
                thing.kind in CLEAR_PIXELS
                and pictures.visible[i].max() <= HIDDEN_PIXELS < pictures.drawn[i].min()
            ):
                alone = survey(replace(scene, things=(thing,)))
                assert np.array_equal(alone.visible[0], pictures.drawn[i])
                return
    pytest.fail("no hidden thing in the sample")


def test_verdicts() -> None:
    many, few = np.full(8, 100), np.full(8, 2)
    assert verdict("car", many, many) == "clear"
    assert verdict("car", few, many) == "hidden"
    assert verdict("car", many // 2, many) == DOUBTFUL
    assert verdict("car", np.where(np.arange(8) < 5, 100, 0), many) == DOUBTFUL


def test_variety() -> None:
    for name, least in (("road", 5), ("weather", 4), ("light", 3)):
        counts = Counter(getattr(example.scene, name) for example in sample())
        assert len(counts) == least and min(counts.values()) > 0.08 * len(sample()), counts
    for kind in ("car", "pedestrian"):
        counts = Counter(len(example.view.of(kind)) for example in sample())
        assert {0, 1, 2, 3} <= set(counts), counts


def test_an_index_may_be_numpys() -> None:
    asked = clip(np.int64(3)).questions
    assert asked == clip(3).questions


def test_bad_arguments() -> None:
    with pytest.raises(IndexError, match="clip must be 0 to 5207, got 5208"):
        clip(5208)
    with pytest.raises(IndexError, match="got -1"):
        clip(-1)
    with pytest.raises(ValueError, match="size must be at least 8 pixels, got 4"):
        clip(0, size=4)
    with pytest.raises(ValueError, match="'test'"):
        split("test")
