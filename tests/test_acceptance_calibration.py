"""Calibration: estimates that may fall as the cosine rises, chosen by held-out log loss, kept as JSON."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from specfuse.acceptance.calibration import FILE, KINDS, AgreementModel, Observations, choose, fit
from specfuse.acceptance.reliability import reliability, write_reliability_picture
from specfuse.calibrate import fit_and_check, held_out_clips


def peaked(count: int = 4000, seed: int = 0) -> Observations:
    """Agreement that peaks in the cosine at 0.7 and rises with the draft probability."""
    draw = np.random.default_rng(seed)
    cosine, draft = draw.uniform(0.3, 1.0, count), draw.uniform(0.02, 0.98, count)
    odds = np.log(draft / (1 - draft)) + 2.5 - 60 * (cosine - 0.7) ** 2
    agreed = draw.uniform(size=count) < 1 / (1 + np.exp(-odds))
    return Observations(cosine, draft, agreed, np.arange(count) // 50)


def test_the_estimate_falls_again_where_agreement_does():
    for kind in ("both", "cosine", "table"):
        model = fit(kind, peaked())
        low, peak, high = model.estimate(np.array([0.4, 0.7, 0.98]), np.full(3, 0.6))
        assert peak > low + 0.1 and peak > high + 0.1, kind


def test_both_features_together_win_and_are_calibrated_on_what_was_left_out():
    model, losses = choose(peaked())
    assert set(losses) == set(KINDS) and model.kind == "both"
    assert losses["both"] < min(losses["draft"], losses["cosine"]) < losses["constant"]
    report = reliability(model, peaked(seed=1))
    assert report["calibration_error"] < 0.03 < report["control"], "shuffled agreement is told apart"
    for row in report["bounds"]:
        if row["share"] > 0.02:
            assert row["measured"] >= 1 - row["max_disagreement"] - 0.05


def test_a_feature_that_says_nothing_is_not_chosen():
    seen = peaked()
    shuffled = np.random.default_rng(3).permutation(seen.agreed)
    _, losses = choose(seen._replace(agreed=shuffled))
    assert losses["constant"] < min(losses["both"], losses["table"]) + 1e-3


def test_the_table_rises_with_the_draft_probability():
    model = fit("table", peaked())
    q = np.linspace(0, 1, 50)
    for c in (0.35, 0.6, 0.72, 0.95):
        assert (np.diff(model.estimate(np.full(50, c), q)) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_estimates_the_same(tmp_path, kind):
    model = fit(kind, peaked(500))
    model.about = {"adapter": None}
    model.save(tmp_path)
    again = AgreementModel.load(tmp_path)
    c, q = np.linspace(-1, 1, 30), np.linspace(0, 1, 30)
    assert np.array_equal(model.estimate(c, q), again.estimate(c, q)) and again.about == model.about


def test_what_is_not_a_number_is_never_trusted():
    model = fit("both", peaked(500))
    assert model.estimate(np.array([np.nan, 0.7]), np.array([0.5, np.nan])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 2},
        {"kind": "magic"},
        {"weights": [1.0]},
        {"weights": [float("inf")] * 5},
        {"weights": None},
        {"steps": [[1]]},
        {"about": 3},
    ],
    ids=lambda change: "-".join(change),
)
def test_broken_files_are_named(tmp_path, change):
    path = fit("both", peaked(500)).save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"calibration\.json is no calibration or is broken"):
        AgreementModel.load(tmp_path)


class Runs:
    ran = False

    def __reduce__(self):
        return setattr, (Runs, "ran", True)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 200_000, pickle.dumps(Runs())], ids=range(6)
)
def test_other_files_are_refused_and_nothing_in_them_runs(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ValueError, match="is no calibration or is broken"):
        AgreementModel.load(tmp_path)
    assert not Runs.ran
    with pytest.raises(FileNotFoundError, match="align calibrate"):
        AgreementModel.load(tmp_path / "nowhere")


def test_too_little_to_fit_is_named():
    seen = peaked(100)
    with pytest.raises(ValueError, match="at least one place"):
        fit("both", seen.take(np.zeros(100, bool)))
    with pytest.raises(ValueError, match="at least 2 clips"):
        choose(seen._replace(groups=np.zeros(100, np.int64)))
    with pytest.raises(ValueError, match="at least 3 drives"):
        fit_and_check(seen, None, None)
    with pytest.raises(ValueError, match="kind must be"):
        fit("magic", seen)


def test_places_that_always_agree_give_finite_weights():
    seen = peaked(200)
    model = fit("both", seen._replace(agreed=np.ones(200, bool)))
    assert np.isfinite(model.weights).all() and model.estimate(seen.cosine, seen.draft).min() > 0.9


def test_calibration_and_measurement_share_no_drive():
    from specfuse.data.world.splits import drive_of

    drives = [
        {drive_of(int(clip)) for clip in held_out_clips(part, 400)} for part in ("calibrate", "measure")
    ]
    assert not drives[0] & drives[1]
    with pytest.raises(ValueError, match="clips must be from 1"):
        held_out_clips("measure", 2000)
    with pytest.raises(ValueError, match="part must be"):
        held_out_clips("train", 2)


@pytest.mark.slow
def test_one_command_calibrates_the_shipped_head(tmp_path, capsys):
    from specfuse.cli.main import run

    models = ["--target", "tiny-video-llava", "--drafter", "tiny-head"]
    size = ["--clips", "8", "--questions", "2", "--json"]
    assert run(["align", "calibrate", *models, *size, "--out", str(tmp_path / "made")]) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert report["places"] > 100 and report["calibration_error"] < report["control"]
    assert AgreementModel.load(tmp_path / "made").about["drafter"] == "HeadDrafter"


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    model = fit_and_check(peaked(600), None, None)
    write_reliability_picture(tmp_path / "curve.png", model.about["report"])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
