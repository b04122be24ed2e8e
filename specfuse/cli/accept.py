"""``specfuse generate --accept``: the rule it names, and the line that says what a lossy answer cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specfuse.acceptance.agreement import token_agreement
from specfuse.cli import UserError


def parse_accept(text: str, max_disagreement: float | None, target: Any, tokenizer: Any) -> Any:
    """The rule that ``--accept`` names.

    Raises:
        UserError: another name.
        FileNotFoundError, ValueError: as ``CosineAcceptance.from_pretrained``.
    """
    from specfuse.acceptance import CosineAcceptance, SemanticAcceptance, TypicalAcceptance
    from specfuse.acceptance.semantic import default_embedding

    if text == "typical":
        return TypicalAcceptance()
    if text == "semantic":
        return SemanticAcceptance(tokenizer, default_embedding())
    name, _, directory = text.partition(":")
    if name == "cosine" and directory:
        bound = {} if max_disagreement is None else {"max_disagreement": max_disagreement}
        return CosineAcceptance.from_pretrained(directory, **bound)
    if name == "cosine":
        raise UserError(
            "--accept cosine needs a calibration (specfuse align calibrate makes one): --accept cosine:DIR"
        )
    raise UserError(f"--accept must be exact, typical, semantic or cosine:DIR, got {text!r}")


def lossy_line(acceptance: Mapping[str, Any]) -> str:
    """One line of plain words."""
    if "fallback" in acceptance:
        return f"Exact after all: {acceptance['fallback']}."
    return (
        f"LOSSY: {acceptance['overruled']} of {acceptance['tokens']} tokens are not what the model chose "
        f"(rule {acceptance['rule']}; agreement {acceptance['measured_agreement']:.1%})."
    )


def compare_with_exact(report: Mapping[str, Any], exact: Mapping[str, Any]) -> dict[str, Any]:
    """What one lossy answer cost and gained beside the lossless one by the same drafter."""
    return {
        "token_agreement": token_agreement(report["token_ids"], exact["token_ids"]),
        "lossless_answer": exact["answer"],
        "lossless_tokens_per_pass": exact["tokens_per_pass"],
        "tokens_per_pass_gained": report["tokens_per_pass"] / exact["tokens_per_pass"] - 1,
        "compared_with": "the lossless answer, same drafter and seed",
    }


def cost_lines(compared: Mapping[str, Any]) -> list[str]:
    """The comparison with the lossless answer as text."""
    exact = compared["lossless_tokens_per_pass"]
    return [
        f"lossless answer: {compared['lossless_answer']}",
        f"token agreement with it {compared['token_agreement']:.1%} (1 - edit distance / length); "
        f"{compared['tokens_per_pass_gained']:+.1%} tokens per pass, from {exact:.2f}",
    ]
