"""specfuse train adapter and specfuse align report: losses, splits, what is learned, files, figures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from adapter_pair_cases import PAIRS, D, N, decoded, expanded, texts, tokens, vectors
from safetensors.torch import save_file

from specfuse.adapters import load_adapter
from specfuse.cli.main import run
from specfuse.train.adapter import PATIENCE, AdapterSettings, train_adapter
from specfuse.train.adapter_losses import build_adapter, feature_loss, info_nce, make_loss, run_adapter
from specfuse.train.adapter_pairs import Pairs, fit_width, load_pairs
from specfuse.train.adapter_report import align_report


@pytest.mark.parametrize("kind", PAIRS)
def test_every_kind_learns_and_its_directory_says_how_well(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specfuse.train.adapter_losses.SMALL_WIDTH", 16)
    pairs = PAIRS[kind]()
    settings = AdapterSettings(tmp_path / "out", kind=kind, steps=120, minutes=9)
    untrained = align_report(build_adapter(kind, pairs, 0).eval(), pairs)
    figures = train_adapter(settings, pairs)
    loaded = align_report(load_adapter(settings.directory), pairs)
    assert loaded == {name: value for name, value in figures.items() if name != "training"}
    if kind == "compression":
        right = figures["tokens"]["right_by_depth"]
        assert right["after"][0] > untrained["tokens"]["right_by_depth"]["after"][0] + 0.3
        assert right["after"][0] > right["constant"][0] + 0.3
    else:
        least = 0.005 if kind == "token-alignment" else 0.02
        assert figures["after"]["mean"] > untrained["after"]["mean"] + least
        assert figures["before"] == untrained["before"]
    written = json.loads((settings.directory / "alignment.json").read_text())
    assert written["training"]["steps"] == 120
    card = (settings.directory / "README.md").read_text()
    assert "120 steps" in card and ("| mean |" in card) == (kind != "compression")


def test_losses_are_their_equations() -> None:
    y, t = torch.randn(7, D), torch.randn(7, D)
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(y, t, strict=True)]
    expected = float((y - t).square().mean()) / 3 + 0.5 * (1 - sum(cosines) / 7)
    assert feature_loss(y, t, 3.0).item() == pytest.approx(expected, rel=1e-5)

    scores = torch.tensor([[float(a @ b / a.norm() / b.norm()) for b in t] for a in y]) / 0.07
    rows, columns = scores.log_softmax(1).diagonal(), scores.log_softmax(0).diagonal()
    assert info_nce(y, t).item() == pytest.approx(-float((rows + columns).mean()) / 2, rel=1e-4)
    assert info_nce(t, t) < 0.1 < info_nce(t.roll(1, 0), t)


def test_divergence_is_zero_where_both_say_the_same() -> None:
    samples = torch.arange(6)
    for kind in ("token-alignment", "residual-mlp"):
        same, other = (decoded(same=True), decoded())
        assert make_loss("kl", build_adapter(kind, same, 0), same)(samples).abs() < 1e-5
        loss = make_loss("kl", build_adapter(kind, other, 0), other)(samples)
        p, q = ((x[samples] @ other.target_head.T).softmax(-1) for x in (other.target, other.source))
        assert loss.item() == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)


def test_contrastive_adds_to_feature() -> None:
    pairs, samples = vectors(), torch.arange(20)
    adapter = build_adapter("linear", pairs, 0)
    mean = pairs.target[pairs.part("train")].mean(0)
    y = run_adapter(adapter, pairs, samples)
    added = make_loss("contrastive", adapter, pairs)(samples) - make_loss("feature", adapter, pairs)(samples)
    assert added.item() == pytest.approx(
        0.1 * info_nce(y - mean, pairs.target[samples] - mean).item(), rel=1e-4
    )


def test_parts_share_no_clip_and_leave_nothing_out() -> None:
    pairs = vectors()
    parts = {name: pairs.part(name) for name in ("train", "validation", "held_out")}
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(N))
    clips = {name: set(pairs.clips[part].tolist()) for name, part in parts.items()}
    assert not clips["train"] & clips["validation"]
    assert not (clips["train"] | clips["validation"]) & clips["held_out"]
    assert len(clips["validation"]) == 8 and len(clips["held_out"]) == 20


def test_what_is_held_out_does_not_change_what_is_learned(tmp_path: Path) -> None:
    pairs = vectors()
    other = vectors()
    other.target[other.held_out] = 0.5
    adapters = []
    for name, found in (("a", pairs), ("b", other)):
        train_adapter(AdapterSettings(tmp_path / name, kind="linear", steps=20), found)
        adapters.append(load_adapter(tmp_path / name).state_dict())
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())


def test_an_interrupted_run_ends_as_the_whole_one(tmp_path: Path) -> None:
    pairs = vectors()

    def stop(stage: str, share: float, text: str) -> None:
        if "step 30," in text:
            raise KeyboardInterrupt

    whole = AdapterSettings(tmp_path / "whole", steps=60)
    figures = train_adapter(whole, pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specfuse.train.loop.SAVE_EVERY_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            train_adapter(AdapterSettings(tmp_path / "part", steps=60), pairs, stop)
    again = train_adapter(AdapterSettings(tmp_path / "part", steps=60, resume=True), pairs)
    figures["training"].pop("seconds"), again["training"].pop("seconds")
    assert again == figures
    with pytest.raises(ValueError, match="belongs to a run with kind='lightweight', not 'linear'"):
        train_adapter(AdapterSettings(tmp_path / "part", kind="linear", steps=9, resume=True), pairs)


def test_training_ends_early_and_keeps_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing can be learned from noise: what is best is found early.
    monkeypatch.setattr("specfuse.train.adapter.CHECK_EVERY", 5)
    pairs = vectors(target=torch.randn(N, D, generator=torch.Generator().manual_seed(5)))
    figures = train_adapter(AdapterSettings(tmp_path / "out", kind="linear", steps=2_000), pairs)
    training = figures["training"]
    assert training["stopped_early"] and training["steps"] < 500
    assert training["steps"] == training["best_step"] + PATIENCE * 5


def test_fit_width() -> None:
    x = torch.arange(3.0)[None]
    assert fit_width(x, 2).tolist() == [[0, 1]] and fit_width(x, 4).tolist() == [[0, 1, 2, 0]]


def test_pairs_come_back_from_their_file(tmp_path: Path) -> None:
    for made in (vectors(), tokens(), texts()):
        made.about, made.features = "somewhere", "pooled"
        made.save(tmp_path / "pairs.safetensors")
        found = load_pairs(tmp_path / "pairs.safetensors")
        for name in Pairs.__dataclass_fields__:
            a, b = getattr(made, name), getattr(found, name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_file_of_two_arrays_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "pairs.safetensors"
    save_file({"source": torch.randn(50, 3), "target": torch.randn(50, 4)}, path)
    found = load_pairs(path)
    assert found.held_out.sum() == 10 and found.clips.tolist() == list(range(50))
    assert torch.equal(found.held_out, load_pairs(path).held_out)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"source": torch.zeros(4, 3)}, "has no array 'target'"),
        (
            {"source": torch.zeros(4, 3), "target": torch.zeros(4, 3), "extra": torch.zeros(1)},
            "array 'extra'",
        ),
        (
            {"source": torch.zeros(5, 3), "target": torch.zeros(4, 3)},
            "source must have 4 rows like target, got 5",
        ),
        ({"source": torch.zeros(4, 3), "target": torch.zeros(4)}, r"target must be .* got \[4\]"),
        ({"source": torch.full((4, 3), float("nan")), "target": torch.zeros(4, 3)}, "source holds numbers"),
        (
            {"source": torch.zeros(4, 3), "target": torch.zeros(4, 3), "clips": torch.zeros(4)},
            r"clips must be \[4\] torch.int64",
        ),
        (
            {"source": torch.zeros(4, 3), "target": torch.zeros(4, 3), "held_out": torch.ones(4).bool()},
            "held_out must hold out some",
        ),
        (
            {"source": torch.zeros(4, 3), "target": torch.zeros(4, 3), "target_head": torch.zeros(9, 2)},
            r"target_head must be \[V, 3\], got \[9, 2\]",
        ),
        (
            {"source": torch.zeros(2, 3), "target": torch.zeros(4, 3), "rows": torch.tensor([0, 1, 2, 0])},
            "rows must lie in 0 to 1",
        ),
    ],
)
def test_broken_pairs_are_named(arrays, text: str, tmp_path: Path) -> None:
    save_file(arrays, tmp_path / "pairs.safetensors")
    with pytest.raises(ValueError, match=text):
        load_pairs(tmp_path / "pairs.safetensors")


def test_other_files_are_no_pairs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file of pairs"):
        load_pairs(tmp_path / "missing")
    (tmp_path / "text").write_text("not safetensors at all")
    with pytest.raises(ValueError, match="is no safetensors file or is broken"):
        load_pairs(tmp_path / "text")


@pytest.mark.parametrize(
    ("kind", "pairs", "loss", "text"),
    [
        ("nonsense", vectors, None, "kind must be one of linear, .* got 'nonsense'"),
        ("linear", vectors, "nonsense", "loss must be one of feature, .* got 'nonsense'"),
        ("linear", vectors, "kl", "needs pairs with a target_head"),
        ("linear", vectors, "tokens", "'tokens' does not go with kind 'linear'"),
        ("token-alignment", decoded, "feature", "'feature' does not go with kind 'token-alignment'"),
        ("token-alignment", vectors, None, "one vocabulary, got 10 and 12"),
        ("linear", texts, None, "whose target are features"),
        ("compression", vectors, None, "whose target are tokens"),
        ("expander", vectors, None, "needs tokens"),
        ("cross-attention", vectors, None, "with a context"),
        ("lightweight", expanded, None, "one target for each source"),
    ],
)
def test_what_does_not_go_together_is_named(kind, pairs, loss, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        train_adapter(AdapterSettings(tmp_path / "out", kind=kind, loss=loss), pairs())
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors().save(tmp_path / "pairs.safetensors")
    out, pairs = str(tmp_path / "out"), ["--pairs", str(tmp_path / "pairs.safetensors")]
    train = ["train", "adapter", "--kind", "linear", *pairs, "--out", out, "--minutes", "0.02", "--json"]
    assert run(train) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["kind"] == "linear" and summary["mean cosine"]["constant"] > 0.7
    assert run(train) == 2 and "is not empty" in capsys.readouterr().err

    report = ["align", "report", "--adapter", out, *pairs]
    drawn, picture = importlib.util.find_spec("matplotlib") is not None, tmp_path / "report.png"
    assert run([*report, "--png", str(picture)]) == (0 if drawn else 2)
    assert picture.exists() == drawn and ("needs matplotlib" in capsys.readouterr().err) != drawn
    assert run([*report, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["after"]["mean"] == summary["mean cosine"]["after"]
    assert run(report) == 0
    shown = capsys.readouterr().out
    assert "cos >= 0.85" in shown and "0.8842" in shown and f"{figures['after']['mean']:.4f}" in shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["align", "nonsense", "--adapter", "X"], "ACTION must be report or calibrate, got 'nonsense'"),
        (["align", "report", "--adapter", "missing"], "no such adapter directory"),
        (["train", "adapter", "--out", "X"], "either --pairs FILE or --target DIR and --drafter DIR"),
        (["train", "adapter", "--out", "X", "--target", "T"], "either --pairs FILE or"),
        (["train", "adapter", "--out", "X", "--target", "T", "--pairs", "P"], "either --pairs FILE or"),
        (["train", "adapter", "--out", "X", "--pairs", "P", "--features", "pooled"], "--features says what"),
        (
            [*("train", "adapter", "--out", "X", "--features", "foo", "--preset", "micro")]
            + ["--target", "tiny-video-llava", "--drafter", "tiny-eventgpt"],
            "features must be one of",
        ),
        (["train", "adapter", "--kind", "K", "--out", "X"], "kind must be one of linear"),
        (["train", "head", "--out", "X", "--seed", "-1"], "--seed must be 0 or above, got -1"),
        (["train", "adapter", "--out", "X", "--minutes", "0"], "minutes must be above 0, got 0.0"),
        (["align", "report", "--adapter", "X", "--png", "none/a.png"], "--png must be a file in an existing"),
    ],
)
def test_wrong_command_lines(arguments: list[str], text: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    assert text in capsys.readouterr().err
