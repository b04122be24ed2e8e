"""The specfuse command: exit codes, one line per mistake, JSON alone on stdout."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_video import write_video

from specfuse.cli.main import COMMANDS, run
from specfuse.cli.train import shown

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "clip.mp4", 16)


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    line = [sys.executable, "-m", "specfuse.cli.main", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command line that must be refused; returns its one line on stderr."""
    assert run([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("specfuse: error: ")
    return line


def generate(model: Path, video: Path, *more: object) -> list[object]:
    return ["generate", "--model", model, "--video", video, "--question", "What is happening?", *more]


def test_help_lists_the_commands_without_loading_torch() -> None:
    code = "import sys\nfrom specfuse.cli.main import run\ncode = run(['--help'])\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\nsys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert "Usage" in printed and f" {name} " in printed and "--help" in printed


def test_no_arguments_show_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nonsense"], "nonsense"),
        (["generate"], "--model"),
        (["doctor", "--loud"], "--loud"),
        (["init-tiny"], "directory"),
    ],
)
def test_usage_mistakes_are_one_line(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in refused(capsys, *arguments)


def test_answer_is_that_of_model_generate(tiny_directory: Path, clip: Path, tmp_path: Path) -> None:
    """Through the process: JSON alone on stdout, tokens those of model.generate computed here by hand."""
    import torch
    from transformers import AutoProcessor, VideoLlavaForConditionalGeneration

    from specfuse.data.video import read_video

    done = command(
        *generate(tiny_directory, clip, "--max-new-tokens", 24, "--compare", "--repeats", 1, "--json")
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    model = VideoLlavaForConditionalGeneration.from_pretrained(tiny_directory, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tiny_directory)
    prompt = "USER: <video>\nWhat is happening? ASSISTANT:"
    inputs = processor(text=prompt, videos=read_video(clip), return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert report["token_ids"] == expected.tolist()
    assert report["tokens"] == len(expected) and report["random_weights"]
    assert report["compare"]["tokens_equal"] and report["compare"]["compared_with"] == "model.generate"


def test_answers_differ_between_videos_and_questions(tiny_directory: Path, tmp_path: Path) -> None:
    """The tiny model is no constant: else equal tokens would prove nothing."""
    from specfuse.data.video import read_video
    from specfuse.models.checkpoint import load_video_llava

    model, processor = load_video_llava(tiny_directory)
    answers = set()
    noise = np.random.default_rng(0).integers(0, 256, (8, 60, 60, 3), dtype=np.uint8)
    for frames in (read_video(write_video(tmp_path / "clip.mp4", 16)), noise):
        for question in ("What is happening?", "Describe the road."):
            prompt = f"USER: <video>\n{question} ASSISTANT:"
            inputs = processor(text=prompt, videos=frames, return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :].tolist()
            assert len(set(tokens)) > len(tokens) // 4, "one token repeated"
            answers.add(tuple(tokens))
    assert len(answers) == 4


def test_real_gif(shared_data: Path, tiny_directory: Path) -> None:
    video = shared_data / "gota_slomo.gif"
    done = command(
        *generate(tiny_directory, video, "--compare", "--repeats", 1, "--max-new-tokens", 32, "--json")
    )
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["compare"]["tokens_equal"]


@pytest.mark.parametrize(
    ("drafter", "nodes"),
    [("none", 32), ("lookup", 32), ("corpus", 32), ("auto", 32), ("auto", "auto"), ("model", 32)],
)
def test_every_drafter_gives_the_same_tokens(
    drafter: str, nodes: int | str, tiny_directory: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = tiny_directory if drafter == "model" else drafter
    arguments = generate(tiny_directory, clip, "--max-new-tokens", 12, "--drafter", name, "--compare")
    assert run([str(a) for a in [*arguments, "--nodes", nodes, "--repeats", 1, "--json"]]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["compare"]["tokens_equal"] and report["tokens"] == 12 and report["nodes"] == nodes
    if drafter == "none":
        assert report["passes"] == 12
    if drafter == "model":  # a copy of the target: every draft is accepted
        assert report["passes"] <= 3


def test_a_directory_of_remembered_answers_drafts(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ["--question", "What is the weather like?", "--max-new-tokens", 40, "--json"]
    common = ["generate", "--model", "tiny-video-llava", "--video", clip, *question]
    passes = []
    for name in ("corpus", "tiny-corpus"):
        assert run([str(a) for a in [*common, "--drafter", name]]) == 0
        passes.append(json.loads(capsys.readouterr().out)["passes"])
    assert passes[1] < passes[0] / 2


def test_streamed_text_and_summary(
    tiny_directory: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = generate(tiny_directory, clip, "--max-new-tokens", 12)
    assert run([str(a) for a in [*arguments, "--json"]]) == 0
    answer = json.loads(capsys.readouterr().out)["answer"]
    assert run([str(a) for a in arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.strip().startswith(answer) and "12 tokens in" in printed
    assert "weights are random" in printed


def test_sampling_depends_on_the_seed_alone(
    tiny_directory: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tokens(seed: int, drafter: str) -> list[int]:
        options = [
            "--temperature",
            1.0,
            "--seed",
            seed,
            "--drafter",
            drafter,
            "--json",
            "--max-new-tokens",
            12,
        ]
        assert run([str(a) for a in generate(tiny_directory, clip, *options)]) == 0
        return json.loads(capsys.readouterr().out)["token_ids"]

    assert tokens(1, "none") == tokens(1, "lookup") != tokens(2, "none")


def test_corpus_file_is_kept_and_used(
    tiny_directory: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = []
    for _ in range(2):
        options = ["--corpus", tmp_path / "answers.corpus", "--max-new-tokens", 24, "--json"]
        assert run([str(a) for a in generate(tiny_directory, clip, *options)]) == 0
        passes.append(json.loads(capsys.readouterr().out)["passes"])
    assert passes[1] <= passes[0] // 2, "the second run remembers the first one's answer"


@pytest.mark.parametrize("drafter", ["auto", "corpus"])
def test_without_native_code_it_still_answers(
    drafter: str, tiny_directory: Path, clip: Path, tmp_path: Path
) -> None:
    # None in sys.modules makes the import fail, as it does where no compiler was found.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['specfuse._C_cpu'] = None\n")
    arguments = generate(tiny_directory, clip, "--max-new-tokens", 8, "--json", "--compare", "--repeats", 1)
    search = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    done = command(*arguments, "--drafter", drafter, PYTHONPATH=search)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["compare"]["tokens_equal"]


def test_missing_video(tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.mp4" in refused(capsys, *generate(tiny_directory, tmp_path / "nowhere.mp4"))


def test_too_few_frames(tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = write_video(tmp_path / "short.mp4", 3)
    assert "holds 3 frames, 8 are needed" in refused(capsys, *generate(tiny_directory, video))


def test_not_a_video(tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.mp4").write_text("no video\n" * 50)
    assert "notes.mp4" in refused(capsys, *generate(tiny_directory, tmp_path / "notes.mp4"))


def broken_model(tiny: Path, directory: Path, what: str) -> Path:
    """A copy of a good model directory with one thing wrong."""
    if what == "missing":
        return directory / "nowhere"
    if what == "file":
        (directory / "model").write_text("x")
        return directory / "model"
    for path in tiny.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((tiny / "config.json").read_text())
    if what == "no config":
        (directory / "config.json").unlink()
    elif what == "broken config":
        (directory / "config.json").write_text("{")
    elif what == "other model":
        (directory / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    elif what == "no weights":
        (directory / "model.safetensors").unlink()
    elif what == "truncated weights":
        data = (tiny / "model.safetensors").read_bytes()
        (directory / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif what == "incomplete weights":
        from safetensors.torch import load_file, save_file

        tensors = load_file(tiny / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
        save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    elif what == "other shape":
        config["text_config"]["intermediate_size"] = 96
        (directory / "config.json").write_text(json.dumps(config))
    elif what == "no processor":
        for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
            (directory / name).unlink()
    return directory


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("missing", "no such model directory"),
        ("file", "is a file"),
        ("no config", "has no config.json"),
        ("broken config", "not valid JSON"),
        ("other model", "'llama'"),
        ("no weights", "weights can not be loaded"),
        ("truncated weights", "weights can not be loaded"),
        ("incomplete weights", "the weights lack lm_head.weight"),
        ("other shape", "weights can not be loaded"),
        ("no processor", "processor"),
    ],
)
def test_wrong_model_directory(
    what: str, text: str, tiny_directory: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = broken_model(tiny_directory, tmp_path, what)
    line = refused(capsys, *generate(model, clip))
    assert text in line and str(model) in line


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--nodes", "0"], "--nodes must be a number from 1 to 1023 or auto, got '0'"),
        (["--nodes", "lots"], "--nodes"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "warp"], "--device"),
        (["--device", "cuda:99"], "--device"),
        (["--drafter", "nonsense"], "--drafter"),
        (["--temperature", "-1"], "--temperature"),
        (["--max-disagreement", "0.3"], "--max-disagreement belongs to --accept cosine:DIR, not to 'exact'"),
        (["--accept", "typical", "--max-disagreement", "0.3"], "not to 'typical'"),
        (["--drafter", "lookup", "--corpus", "x"], "--corpus"),
        (["--question", "what is <video>?"], "--question"),
        (["--max-new-tokens", "none"], "--max-new-tokens"),
    ],
)
def test_wrong_options_are_named(
    options: list[str], text: str, tiny_directory: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in refused(capsys, *generate(tiny_directory, clip, *options))


def test_wrong_corpus_file(
    tiny_directory: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.corpus").write_text("not a corpus")
    assert "wrong.corpus" in refused(
        capsys, *generate(tiny_directory, clip, "--corpus", tmp_path / "wrong.corpus")
    )


def test_init_tiny_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "--force" in refused(capsys, "init-tiny", tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "notes.txt"]
    assert run(["init-tiny", str(tmp_path), "--force"]) == 0
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "notes.txt").exists()


def test_the_example_that_init_tiny_suggests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init-tiny", str(tmp_path / "tiny")]) == 0
    suggestion = capsys.readouterr().out.splitlines()[-1].removeprefix("try: specfuse ")
    assert run([*shlex.split(suggestion), "--max-new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 4


def test_init_tiny_is_reproducible_and_says_that_it_is_random(tmp_path: Path) -> None:
    from specfuse.models.tiny import init_tiny

    first, again, other = (init_tiny(tmp_path / n, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    for name in ("model.safetensors", "tokenizer.json", "config.json", "example.gif"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    assert "weights are random" in (first / "README.md").read_text()


def test_tiny_processor_expands_placeholders_as_the_model_expects(tiny_directory: Path) -> None:
    """Images and videos of odd sizes; a disagreement would raise in the model's forward."""
    from specfuse.models.checkpoint import load_video_llava

    model, processor = load_video_llava(tiny_directory)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 61, 97, 3), dtype=np.uint8)
    video = processor(text="USER: <video>\nWhat? ASSISTANT:", videos=pixels, return_tensors="pt")
    assert (video["input_ids"] == model.config.video_token_index).sum() == 5 * 17
    image = processor(text="USER: <image>\nWhat? ASSISTANT:", images=pixels[0], return_tensors="pt")
    assert (image["input_ids"] == model.config.image_token_index).sum() == 16
    for inputs in (video, image):
        assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
    text = "Grüße: 猫 & <s> tokens"
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids[1:]) == text and ids[0] == processor.tokenizer.bos_token_id


def test_minutes_are_no_share() -> None:
    assert shown("minutes", 0.5) == "0.50" and shown("tokens_per_pass", 1.0) == "1.00"
    assert shown("acceptance_1", 0.5) == "50.0%" and shown("steps", 6) == "6"
