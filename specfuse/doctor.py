"""What this installation is made of, and whether it works: the facts behind ``specfuse doctor``.

Every import that can break is tried here and reported; nothing in this file raises.
"""

from __future__ import annotations

import importlib
import json
import platform
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from specfuse.hf.versions import outside_range

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
    "av",
    "flash-attn",
)
REINSTALL = "pip install --force-reinstall --no-deps specfuse (or `pip install -e .` in a checkout)"


def diagnose() -> dict[str, Any]:
    """Looks at versions, native modules, devices, attention backends, and runs every op once.

    Returns:
        A dict that ``json.dumps`` takes:

        - ``versions``: package -> version, or None where it is not installed.
        - ``native``: module -> what ``_build_info.json`` says about it, and whether it imports.
        - ``gpus``: name, compute capability and memory of each CUDA device.
        - ``implementations``: op -> device -> implementation the dispatcher will choose.
        - ``attention``: backend -> "ok" or why it can not be used.
        - ``self_test``: op -> "ok" or what went wrong.
        - ``notes``: what could be faster; ``errors``: what does not work; ``ok``: there are no errors.
    """
    errors: list[str] = []
    report: dict[str, Any] = {"versions": versions(), "native": native_modules(), "gpus": gpus()}
    report["implementations"] = _tried(_implementations, errors, "specfuse.ops", {})
    report["attention"] = attention_backends()
    report["self_test"] = _tried(_self_test, errors, "the self-test", {})
    errors += [f"{op}: {result}" for op, result in report["self_test"].items() if result != "ok"]
    errors += import_errors()
    report["notes"] = notes(report["native"], report["gpus"])
    report["errors"] = errors
    report["ok"] = not errors
    return report


def versions() -> dict[str, str | None]:
    """Installed versions; None for what is not installed."""
    found: dict[str, str | None] = {"specfuse": _version("specfuse"), "python": platform.python_version()}
    found["platform"] = platform.platform()
    for name in PACKAGES:
        found[name] = _version(name)
        if name == "torch":
            cuda = _tried(lambda: importlib.import_module("torch").version.cuda, [], "torch", None)
            found["torch's CUDA"] = cuda
    return found


def native_modules() -> dict[str, dict[str, Any]]:
    """Per module: ``built``, ``imported``, and the compiler and architectures, or the ``reason`` it lacks."""
    path = Path(__file__).with_name("_build_info.json")
    built = json.loads(path.read_text())["modules"] if path.exists() else {}
    report = {}
    for name in ("_C_cpu", "_C_cuda"):
        entry = dict(built.get(name) or {"built": False, "reason": "this copy was not installed by pip"})
        try:
            importlib.import_module(f"specfuse.{name}")
            entry["imported"] = True
        except ImportError as error:
            entry["imported"] = False
            if entry["built"]:
                entry["reason"] = f"built, but does not import: {error}"
        report[name] = entry
    return report


def gpus() -> list[dict[str, Any]]:
    """CUDA devices torch sees: ``name``, ``capability`` such as "90", ``memory_gib``."""
    try:
        import torch

        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception:
        return []
    return [
        {"name": p.name, "capability": f"{p.major}{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)}
        for p in properties
    ]


def attention_backends() -> dict[str, str]:
    """Per backend "ok" or why it can not be used. Each is called or really imported."""
    tests = {"specfuse_tree": _tree, "sdpa": _sdpa, "eager": _eager}
    tests |= {"flex_attention": _flex, "flash_attention_2": _flash}
    found = {name: _outcome(test) for name, test in tests.items()}
    # There, but without a tree mask: generation refuses them.
    for name in ("flex_attention", "flash_attention_2"):
        found[name] = "there, not used by specfuse" if found[name] == "ok" else found[name]
    return found


def import_errors() -> list[str]:
    """Tries the imports that Video-LLaVA needs, and explains the ways they are known to break."""
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        return [_explain_torchvision(error)]
    try:
        transformers = importlib.import_module("transformers")
        for suffix in ("ForConditionalGeneration", "Processor", "VideoProcessor"):
            getattr(transformers, f"VideoLlava{suffix}")
    except Exception as error:
        return [f"transformers does not import Video-LLaVA: {_first_line(error)}"]
    return []


def notes(native: dict[str, dict[str, Any]], devices: list[dict[str, Any]]) -> list[str]:
    """What works but could be faster, and what to do about it."""
    found = [note for name in ("transformers", "torch") if (note := outside_range(name)) is not None]
    if not native["_C_cpu"]["imported"]:
        found.append(
            "no native CPU code, ops run on their eager reference: "
            f"{native['_C_cpu'].get('reason', 'unknown reason')}; then {REINSTALL}"
        )
    if devices and not native["_C_cuda"]["imported"]:
        found.append(
            "a GPU is here but the CUDA ops are not, they run on their eager reference: "
            f"{native['_C_cuda'].get('reason', 'unknown reason')}; then {REINSTALL}"
        )
    built = {re.sub(r"\D", "", arch) for arch in native["_C_cuda"].get("archs", [])}
    for device in devices if native["_C_cuda"]["imported"] else []:
        capability = device["capability"]
        if built and capability not in built:
            found.append(
                f"{device['name']} has compute capability {capability}, CUDA ops were built for "
                f"{', '.join(sorted(built, key=int))}; set SPECFUSE_CUDA_ARCHS={capability} and reinstall"
            )
    return found


def _implementations() -> dict[str, dict[str, str]]:
    return importlib.import_module("specfuse.ops").implementations()


def _self_test() -> dict[str, str]:
    return importlib.import_module("specfuse.ops").self_test()


def _tried(call: Callable[[], Any], errors: list[str], what: str, otherwise: Any) -> Any:
    try:
        return call()
    except Exception as error:
        errors.append(f"{what} failed: {type(error).__name__}: {_first_line(error)}")
        return otherwise


def _outcome(test: Callable[[], object]) -> str:
    try:
        test()
    except ImportError as error:
        return f"not installed: {_first_line(error)}"
    except Exception as error:
        return f"{type(error).__name__}: {_first_line(error)}"
    return "ok"


def _queries() -> Any:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    return torch.randn(1, 2, 4, 16, device=device, dtype=dtype)


def _tree() -> None:
    attention = importlib.import_module("specfuse.passes.attention")
    registered = importlib.import_module("transformers").AttentionInterface()[attention.NAME]
    q = _queries()
    bits, lengths = q.new_ones((1, 2)).long(), q.new_zeros(1).long()
    registered(None, q[:, :, :2], q, q, attention.TreeMask.wrap(bits, lengths, None, tail=2, longest=0))


def _eager() -> None:
    q = _queries()
    (q @ q.mT).softmax(-1) @ q


def _sdpa() -> None:
    q = _queries()
    importlib.import_module("torch").nn.functional.scaled_dot_product_attention(q, q, q)


def _flex() -> None:
    importlib.import_module("torch.nn.attention.flex_attention").flex_attention  # noqa: B018 (as above)


def _flash() -> None:
    # find_spec("flash_attn") is true when only flash-attn 4 is installed; version 2 has this function.
    importlib.import_module("flash_attn.flash_attn_interface").flash_attn_func  # noqa: B018
    if not importlib.import_module("torch").cuda.is_available():
        raise RuntimeError("installed, but there is no CUDA device")


def _explain_torchvision(error: Exception) -> str:
    torch_version, vision_version = _version("torch") or "?", _version("torchvision")
    if vision_version is None:
        return (
            "torchvision is missing and Hugging Face's VideoLlavaProcessor needs it: pip install torchvision"
        )
    return (
        f"torchvision {vision_version} does not fit torch {torch_version} ({_first_line(error)}), which "
        "breaks transformers too: one is a CPU and the other a CUDA build, or their versions differ. Install "
        "both in one command from one index: pip install --force-reinstall torch torchvision"
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]
