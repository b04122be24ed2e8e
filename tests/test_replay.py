"""Replay: the recording format, counting of passes, the command line, the figures on real answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specfuse.cli.main import run
from specfuse.data.make_recording import main as make_recording_main
from specfuse.data.make_recording import make_recording
from specfuse.data.recording import Recording, Sample, load_recording, parse_recording
from specfuse.drafters import CorpusDrafter, Drafter, DraftState, PromptLookupDrafter
from specfuse.replay import make_drafter, replay, shuffled
from specfuse.tree import TokenTree

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "specfuse" / "data" / "example_recording.json"
REAL = "video_llava_dsec_1s_tokens.json"


def recording(
    *answers: list[int], question: str = "what?", draft: tuple[int, ...] | None = None
) -> Recording:
    return Recording([Sample(tuple(a), draft, question, str(i)) for i, a in enumerate(answers)], "")


class Oracle(Drafter):
    """Drafts a chain of the true answer, and beside it a wrong sibling at every depth."""

    def __init__(self, answer: list[int], wrong_after: int = 10**9):
        self.answer, self.wrong_after = answer, wrong_after
        self.seen: list[tuple[int, ...]] = []

    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        done = len(state.answers[0])
        self.seen.append(tuple(state.answers[0]))
        chain = self.answer[done : done + min(max_nodes, state.remaining[0] - 1)]
        chain = [t if i < self.wrong_after else t + 1 for i, t in enumerate(chain)]
        return TokenTree.from_chains([state.root(0)], [chain])

    def observe(self, tokens, question=()):
        self.seen.append(("learned", *tokens))


# ----------------------------------------------------------------- counting


def test_plain_decoding_takes_one_pass_per_token():
    result = replay(recording([5, 6, 7], [8, 9]), None, 16)
    assert (result.tokens, result.passes, result.tokens_per_pass) == (5, 5, 1.0)
    assert result.histogram == {1: 5}


@pytest.mark.parametrize(
    ("nodes", "wrong_after", "passes"),
    [(4, 99, 2), (9, 99, 1), (20, 99, 1), (4, 2, 4), (4, 0, 10), (0, 99, 10), (1, 99, 5)],
)
def test_a_pass_emits_the_accepted_drafts_and_one_more(nodes, wrong_after, passes):
    answer = list(range(30, 40))
    result = replay(recording(answer), Oracle(answer, wrong_after), nodes)
    assert result.passes == passes
    assert result.tokens == sum(emitted * n for emitted, n in result.histogram.items()) == 10


def test_an_answer_is_learned_only_after_its_last_pass():
    answer = [1, 2, 3, 4]
    drafter = Oracle(answer, wrong_after=0)
    replay(recording(answer), drafter, 4)
    assert drafter.seen == [(), (1,), (1, 2), (1, 2, 3), ("learned", 1, 2, 3, 4)]
    drafter.seen.clear()
    replay(recording(answer), drafter, 4, learning=False)
    assert drafter.seen[-1] == (1, 2, 3)


class Witness(CorpusDrafter):
    """A CorpusDrafter that keeps what it proposed."""

    def __init__(self) -> None:
        super().__init__()
        self.trees: list[tuple[list[int], list[int]]] = []

    def propose(self, state: DraftState, max_nodes: int) -> TokenTree:
        tree = super().propose(state, max_nodes)
        self.trees.append((tree.tokens[0].tolist(), tree.parents[0].tolist()))
        return tree


def test_no_peeking_later_answers_do_not_change_earlier_drafts():
    answers = [list(sample.target) for sample in load_recording("example").samples[:30]]
    alone, longer, swapped = Witness(), Witness(), Witness()
    passes = replay(recording(*answers), alone, 16).passes
    replay(recording(*answers, *(answer[::-1] for answer in answers)), longer, 16)
    assert longer.trees[:passes] == alone.trees and len(longer.trees) > passes
    # Control: answers that come earlier do change what is drafted.
    replay(recording(answers[-1], *answers[:-1]), swapped, 16)
    assert swapped.trees != alone.trees


def test_a_target_that_says_something_else_is_noticed(monkeypatch):
    """Negative control: the replay checks what verify_tree emits against the recording."""
    import specfuse.replay as module

    honest = module.verify_tree
    monkeypatch.setattr(module, "verify_tree", lambda logits, tree: honest(-logits, tree))
    with pytest.raises(RuntimeError, match="emitted"):
        replay(recording([1, 2, 3, 4], [4, 3, 2, 1]), None, 4)


def test_scopes_follow_the_questions():
    samples = []
    for i in range(12):
        samples.append(Sample((10, 11, 12, 13), None, "left?", str(i)))
        samples.append(Sample((20, 21, 22, 23), None, "right?", str(i)))
    mixed = replay(Recording(samples, ""), CorpusDrafter(), 4)
    same = [sample._replace(question="?") for sample in samples]
    assert mixed.passes < replay(Recording(same, ""), CorpusDrafter(), 4).passes


@pytest.mark.parametrize("name", ["corpus", "lookup", "combined"])
def test_every_drafter_replays_the_example(name):
    example = load_recording("example")
    example = example._replace(samples=example.samples[:80])
    result = replay(example, make_drafter(name), 16)
    assert result.tokens == sum(len(sample.target) for sample in example.samples)
    assert result.tokens_per_pass > (1.05 if name == "lookup" else 3.0)
    assert len(result.propose_us) == result.passes
    assert (result.learn_s > 0) is (name != "none")


def test_shuffling_is_a_permutation_that_follows_the_seed():
    samples = load_recording("example").samples
    first, again, other = (shuffled(samples, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(samples) and first != samples


@pytest.mark.parametrize("nodes", [-1, 1024])
def test_a_bad_budget_is_refused(nodes):
    with pytest.raises(ValueError, match=f"nodes must be from 0 to 1023, got {nodes}"):
        replay(recording([1]), None, nodes)


# ------------------------------------------------------------------- format


def test_the_example_is_what_its_program_writes(tmp_path: Path):
    assert make_recording_main([str(tmp_path / "out.json")]) == 0
    assert (tmp_path / "out.json").read_bytes() == EXAMPLE.read_bytes()
    assert EXAMPLE.stat().st_size < 200_000
    assert "ynthetic" in load_recording("example").description


def test_the_example_can_be_read_as_words():
    content = make_recording(samples=3)
    words = [content["vocabulary"][token] for token in content["samples"][0]["target"]]
    assert words[-1] == "</s>" and "." in words
    assert all(token < len(content["vocabulary"]) for s in content["samples"] for token in s["target"])


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["--help"]])
def test_the_program_says_how_it_is_used(arguments, capsys):
    assert make_recording_main(arguments) == 2
    assert "usage" in capsys.readouterr().err


BAD = {
    "not JSON": "hello",
    "a list": "[1, 2]",
    "no samples": '{"question": "?"}',
    "empty samples": '{"samples": []}',
    "sample without target": '{"samples": [{"draft": [1]}]}',
    "sample not an object": '{"samples": [[1, 2]]}',
    "empty target": '{"samples": [{"target": []}]}',
    "text target": '{"samples": [{"target": "abc"}]}',
    "float token": '{"samples": [{"target": [1, 2.5]}]}',
    "bool token": '{"samples": [{"target": [true]}]}',
    "negative token": '{"samples": [{"target": [1]}, {"target": [-3]}]}',
    "huge token": '{"samples": [{"target": [99999999999]}]}',
    "bad draft": '{"samples": [{"target": [1], "draft": [null]}]}',
    "bad question": '{"samples": [{"target": [1], "question": 7}]}',
    "too deep": '{"samples": ' + "[" * 100_000,
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recording_is_one_clear_line_and_exit_code_2(name, tmp_path, capsys):
    path = tmp_path / "bad.json"
    path.write_text(BAD[name])
    assert run(["replay", str(path), "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1 and "bad.json" in err


def test_errors_name_the_sample():
    with pytest.raises(ValueError, match=r"x: sample 1: target must hold ids from 0 .* got -3"):
        parse_recording(BAD["negative token"], "x")


def test_samples_take_the_common_question_unless_they_have_their_own():
    text = (
        '{"question": "a", "samples": [{"target": [1]}, {"target": [2], "question": "b"}, {"target": [3]}]}'
    )
    parsed = parse_recording(text, "x")
    assert [sample.question for sample in parsed.samples] == ["a", "b", "a"]
    assert parsed.questions == ["a", "b"] and parsed.vocab_size == 4


# ------------------------------------------------------------- command line


def replay_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["replay", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def short(tmp_path: Path) -> str:
    """The first samples of the example, as a file of their own."""
    content = json.loads(EXAMPLE.read_text())
    content["samples"] = content["samples"][:60]
    (tmp_path / "short.json").write_text(json.dumps(content))
    return str(tmp_path / "short.json")


def test_json_has_the_promised_keys_and_agrees_with_itself(capsys):
    figures = replay_json(capsys)
    assert figures["drafter"] == "corpus" and figures["nodes"] == 16
    assert figures["tokens_per_pass"] == figures["tokens"] / figures["passes"] > 5
    assert sum(figures["histogram"].values()) == figures["passes"]
    assert sum(int(n) * passes for n, passes in figures["histogram"].items()) == figures["tokens"]
    assert figures["propose_us_p50"] > 0 and figures["learn_tokens_per_s"] > 0


def test_options_change_what_is_replayed(capsys, short):
    base = replay_json(capsys, short)
    more = replay_json(capsys, short, "--nodes", "32")
    plain = replay_json(capsys, short, "--drafter", "none")
    mixed = replay_json(capsys, short, "--order", "shuffled", "--seed", "3")
    hinted = replay_json(capsys, short, "--evidence")
    assert more["tokens_per_pass"] > base["tokens_per_pass"] > plain["tokens_per_pass"] == 1.0
    assert plain["learn_tokens_per_s"] is None
    assert mixed["passes"] != base["passes"] and mixed["seed"] == 3 and mixed["tokens"] == base["tokens"]
    assert hinted["evidence"] is True and hinted["passes"] != base["passes"]


def test_text_output_shows_the_figure_and_the_histogram(capsys, short):
    assert run(["replay", short, "--nodes", "8"]) == 0
    out = capsys.readouterr().out
    assert "tokens per pass" in out and "replayed" in out and "ynthetic" in out and "#" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["nowhere.json"],
        ["example", "--drafter", "magic"],
        ["example", "--order", "backwards"],
        ["example", "--nodes", "-1"],
        ["example", "--nodes", "5000"],
        ["."],
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["replay", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 1


def test_evidence_needs_drafts(capsys, tmp_path):
    (tmp_path / "a.json").write_text('{"samples": [{"target": [1, 2]}]}')
    assert run(["replay", str(tmp_path / "a.json"), "--evidence"]) == 2
    assert "draft" in capsys.readouterr().err


# ----------------------------------------------------- figures on real answers


@pytest.fixture(scope="module")
def real(shared_data: Path) -> Recording:
    path = shared_data / REAL
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return load_recording(path)


@pytest.mark.parametrize(("nodes", "least"), [(16, 6.0), (32, 7.0)])
def test_figures_on_real_answers_in_file_order(real, nodes, least):
    """Cold start, each of the 1,100 answers learned after its last pass."""
    pytest.importorskip("specfuse._C_cpu")
    assert replay(real, CorpusDrafter(), nodes).tokens_per_pass >= least


def test_figures_hold_on_answers_that_tuning_never_saw(real):
    """Shuffled order, and the second half after a cold start of its own; both below what file order gives."""
    pytest.importorskip("specfuse._C_cpu")
    mixed = real._replace(samples=shuffled(real.samples, 11))
    assert replay(mixed, CorpusDrafter(), 16).tokens_per_pass >= 5.4
    half = real._replace(samples=real.samples[len(real.samples) // 2 :])
    assert replay(half, CorpusDrafter(), 16).tokens_per_pass >= 5.8


def test_lookup_gains_little_on_real_answers(real):
    """Control: the figure comes from remembering answers, not from repetition inside an answer."""
    few = real._replace(samples=real.samples[:100])
    assert replay(few, PromptLookupDrafter(), 16).tokens_per_pass < 1.6
