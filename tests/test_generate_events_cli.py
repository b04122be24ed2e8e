"""``specfuse generate --events``: an EventGPT drafts from an event file, by name or by directory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_cli import clip as clip
from test_cli import generate, refused
from vocabulary_cases import parrot, tokenizer

from specfuse.acceptance.agreement import token_agreement
from specfuse.cli.main import run
from specfuse.data import miniature
from specfuse.data.world import events
from specfuse.events import save
from specfuse.models.checkpoint import load_draft_model


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("events") / "events.npz"
    save(path, events(4200, 64, 8))
    return path


def test_answer_with_events(clip: Path, recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--compare", "--repeats", 1, "--json", "--max-new-tokens", 24)
    found = {}
    for drafter in ("tiny-eventgpt", miniature.directory("tiny-eventgpt-naive"), "none"):
        given = [] if drafter == "none" else ["--events", recording]
        line = generate(Path("tiny-video-llava"), clip, *more, "--drafter", drafter, *given)
        assert run([str(part) for part in line]) == 0
        found[str(drafter)] = json.loads(capsys.readouterr().out)
    taught, naive, plain = found.values()
    assert taught["token_ids"] == naive["token_ids"] == plain["token_ids"]
    assert taught["compare"]["tokens_equal"]
    assert taught["passes"] < naive["passes"] <= plain["passes"]


def test_sampled(clip: Path, recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = generate(
        Path("tiny-video-llava"), clip, "--temperature", 0.8, "--compare", "--repeats", 1, "--json"
    )
    line += ["--max-new-tokens", 12, "--drafter", "tiny-eventgpt", "--events", recording]
    assert run([str(part) for part in line]) == 0
    assert json.loads(capsys.readouterr().out)["compare"]["tokens_equal"]


def test_a_lossy_answer_beside_the_lossless_one(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = generate(
        Path("tiny-video-llava"), clip, "--drafter", "tiny-head", "--max-new-tokens", 60, "--json"
    )

    def report(*more: str) -> dict[str, Any]:
        assert run([str(part) for part in [*line, *more]]) == 0
        return json.loads(capsys.readouterr().out)

    exact, lossy = report(), report("--accept", "typical", "--compare")
    compared = lossy["compare"]
    assert lossy["acceptance"]["lossless"] is False and lossy["token_ids"] != exact["token_ids"]
    assert compared["lossless_answer"] == exact["answer"]
    assert compared["token_agreement"] == token_agreement(lossy["token_ids"], exact["token_ids"]) < 1
    assert compared["tokens_per_pass_gained"] == lossy["tokens_per_pass"] / exact["tokens_per_pass"] - 1


def test_events_and_their_drafter_belong_together(
    tiny_directory: Path, clip: Path, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for drafter in ("auto", "none", tiny_directory, "tiny-head", tmp_path / "absent"):
        line = refused(capsys, *generate(tiny_directory, clip, "--events", recording, "--drafter", drafter))
        assert "--events belongs to an EventGPT's directory as --drafter, not to " in line
    line = refused(capsys, *generate(tiny_directory, clip, "--drafter", "tiny-eventgpt"))
    assert (
        "--drafter tiny-eventgpt is an EventGPT: it drafts from events, specfuse generate --events FILE"
        in line
    )
    more = ("--drafter", "tiny-eventgpt", "--events")
    line = refused(capsys, *generate(tiny_directory, clip, *more, tmp_path / "absent.npz"))
    assert "absent.npz: no such file of events" in line
    (tmp_path / "broken.npz").write_bytes(recording.read_bytes()[:200])
    line = refused(capsys, *generate(tiny_directory, clip, *more, tmp_path / "broken.npz"))
    assert "broken.npz" in line


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["pipeline"]}, "weights can not be loaded"),
        ({"architectures": [5]}, "architectures must be a list of names, got [5]"),
        ({"auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}, "contains custom code"),
    ],
)
def test_what_a_config_names_is_not_run(
    config: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # as if asked, and somebody said yes
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    kind = "llama" if "architectures" in config else "own"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} | config))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_draft_model(tmp_path)
    assert not ran.exists() and not capsys.readouterr().out


def test_a_draft_model_with_another_tokenizer(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text model of a directory drafts in its own ids where its tokenizer is not the target's."""
    parrot("sentencepiece").save_pretrained(tmp_path)
    tokenizer("sentencepiece").save_pretrained(tmp_path)
    line = generate(
        Path("tiny-video-llava"), clip, "--drafter", tmp_path, "--compare", "--repeats", 1, "--json"
    )
    assert run([str(part) for part in [*line, "--max-new-tokens", 16, "--repeats", 1]]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["compare"]["tokens_equal"]
    assert report["drafted"] > 0
