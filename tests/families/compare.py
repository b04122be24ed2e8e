"""One class compared with ``model.generate``: prompts times drafters, and what came out."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import specfuse
from specfuse.drafters import Drafter, DraftState

from .build import SCALES, build, placeholder_tokens, randomize
from .errors import described
from .media import media_prompts
from .prompts import Prompt, text_prompts

PACKAGE = Path(specfuse.__file__).parent


class RightAmongWrong(Drafter):
    """Drafts the next tokens of a known answer, each behind a wrong sibling where ``siblings``."""

    def __init__(self, answers: Sequence[Sequence[int]], depth: int, siblings: bool):
        self.answers, self.depth, self.siblings = answers, depth, siblings

    def propose(self, state: DraftState, max_nodes: int) -> specfuse.TokenTree:
        tokens, parents = [], []
        for row in range(state.batch_size):
            known = self.answers[row][len(state.answers[row]) :] if state.active[row] else []
            nodes, above, at = [state.root(row)], [-1], 0
            for token in known[: self.depth]:
                if self.siblings:
                    nodes.append((token + 1) % 50 + 3)
                    above.append(at)
                nodes.append(token)
                above.append(at)
                at = len(nodes) - 1
            tokens.append(nodes)
            parents.append(above)
        return specfuse.TokenTree.from_parents(tokens, parents)


WITH_LOGITS = {"return_dict_in_generate": True, "output_logits": True}
TOLERANCE = 1e-4
"""Of the largest logit: many norms and softmaxes are taken in float32 whatever the model's dtype."""
DRAFTERS = ("none", "tree", "tree logits", "chain", "auto", "auto again")


@dataclass
class Comparison:
    """One call of specfuse beside one of ``model.generate``."""

    prompt: str
    drafter: str
    verdict: str  # equal, refused, wrong, error
    detail: str = ""
    accepted: int = 0
    warning: str = ""


@dataclass
class Outcome:
    """What was found for one class."""

    name: str
    model_type: str
    outcome: str  # equal, plain only, refused, wrong, error, not comparable, not built
    detail: str = ""
    prompts: list[str] = field(default_factory=list)
    accepted: int = 0
    comparisons: list[Comparison] = field(default_factory=list)


def compare(name: str, model_type: str) -> Outcome:
    """Builds the class and compares it; whatever goes wrong is in the outcome."""
    try:
        model = build(name, model_type)
    except Exception as error:
        return Outcome(name, model_type, "not built", described(error))
    return compare_model(model, name, model_type)


def compare_model(model: PreTrainedModel, name: str, model_type: str) -> Outcome:
    """Compares a built model over all its prompts."""
    arguments: dict[str, Any] = {"do_sample": False}
    banned = placeholder_tokens(model.config)
    if banned:
        arguments["suppress_tokens"] = banned
    prompts, why = choose_weights(model, arguments)
    outcome = Outcome(name, model_type, "", why)
    unequal = []
    for prompt in prompts:
        try:
            expected, logits = reference(model, prompt, arguments)
        except Exception as error:
            unequal.append(f"{prompt.name}: model.generate raises {described(error)}")
            continue
        found = [one(model, prompt, drafter, expected, logits, arguments) for drafter in DRAFTERS]
        if any(c.verdict == "wrong" for c in found) and not _repeats(model, prompt, expected, arguments):
            unequal.append(f"{prompt.name}: model.generate does not repeat itself")
            continue
        outcome.comparisons += found
        outcome.prompts.append(prompt.name)
    return summed_up(outcome, unequal)


def choose_weights(model: PreTrainedModel, arguments: dict[str, Any]) -> tuple[list[Prompt], str]:
    """Draws weights until an answer varies; the prompts, and a remark where no answer does."""
    most, best, trouble = -1, SCALES[0], ""
    for scales in SCALES:
        randomize(model, *scales)
        prompt = text_prompts(model)[0]
        try:
            answer = reference(model, prompt, arguments)[0][0, prompt.length :]
        except Exception as error:
            trouble = described(error)
            break
        if len(set(answer.tolist())) > most:
            most, best = len(set(answer.tolist())), scales
        if most >= 8:
            break
    randomize(model, *best)
    pictures, why = media_prompts(model)
    remarks = [] if most >= 4 or trouble else [f"answers hold {most} different tokens"]
    return [*text_prompts(model), *pictures], "; ".join([*remarks, why] if why else remarks)


def reference(
    model: PreTrainedModel, prompt: Prompt, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """What ``model.generate`` says, and its logits ``[B, T, V]`` where it returns any."""
    forget(model)
    with torch.no_grad():
        output = model.generate(**prompt.inputs, max_new_tokens=prompt.new, **arguments, **WITH_LOGITS)
    if isinstance(output, Tensor):
        return output, None
    return output.sequences, torch.stack(output.logits, dim=1)


def _repeats(model: PreTrainedModel, prompt: Prompt, expected: Tensor, arguments: dict[str, Any]) -> bool:
    return torch.equal(reference(model, prompt, arguments)[0], expected)


def forget(model: PreTrainedModel) -> None:
    """Ropes that depend on the length leave a state behind: every run begins with the short one."""
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6]]))
    except Exception:  # a class that takes no text alone has no such rope
        return


def one(
    model: PreTrainedModel,
    prompt: Prompt,
    kind: str,
    expected: Tensor,
    logits: Tensor | None,
    arguments: dict[str, Any],
) -> Comparison:
    """One call of specfuse; never raises."""
    answers = expected[:, prompt.length :].tolist()
    drafter: Drafter | str | None = "auto" if kind.startswith("auto") else None
    if kind in ("tree", "tree logits", "chain"):
        drafter = RightAmongWrong(answers, 4, siblings=kind != "chain")
    found = Comparison(prompt.name, kind, "equal")
    with warnings.catch_warnings(record=True) as caught, _Logged() as logged:
        warnings.simplefilter("always")
        try:
            forget(model)
            generator = specfuse.SpeculativeGenerator(model, drafter)
            looks = WITH_LOGITS if kind == "tree logits" else {}
            got = generator.generate(**prompt.inputs, max_new_tokens=prompt.new, **arguments, **looks)
        except Exception as error:
            worded = is_refusal(error, model)
            found.verdict, found.detail = ("refused" if worded else "error"), described(error, not worded)
            return found
    seen = None
    if not isinstance(got, Tensor):
        got, seen = got.sequences, torch.stack(got.logits, dim=1)
    stats = generator.last_stats
    found.accepted = stats.accepted
    found.warning = " ".join([*logged.lines, *(str(w.message) for w in caught if "specfuse" in w.filename)])
    # Without a pass of ours, model.generate has decoded all of it.
    if stats.drafting_stopped and stats.passes:
        found.verdict, found.detail = "error", f"drafting stopped: {stats.drafting_stopped}"
    if got.shape != expected.shape or not torch.equal(got, expected):
        found.verdict, found.detail = "wrong", _parting(got, expected, prompt)
    elif seen is not None and logits is not None and (apart := _apart(seen, logits)):
        found.verdict, found.detail = "wrong", apart
    return found


def _parting(got: Tensor, expected: Tensor, prompt: Prompt) -> str:
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    at = int((got != expected).any(0).nonzero()[0]) - prompt.length
    return f"parts at answer token {at} of {prompt.new}"


def _apart(seen: Tensor, expected: Tensor) -> str:
    """Where logits differ by more than rounding: a wrong mask need not show in a short answer."""
    # Some classes rule tokens out with the lowest number there is.
    banned = expected < -1e30
    if not torch.equal(banned, seen < -1e30):
        return "other tokens are ruled out"
    seen, expected = seen.masked_fill(banned, 0), expected.masked_fill(banned, 0)
    scale = expected.abs().amax(dim=(0, 2)).clamp(min=1e-30)
    worst = (seen - expected).abs().amax(dim=(0, 2)) / scale
    for at, apart in enumerate(worst.tolist()):
        if not apart <= TOLERANCE:
            return f"logits differ by {apart:.1e} of their size at answer token {at}"
    return ""


def is_refusal(error: Exception, model: PreTrainedModel) -> bool:
    """Whether an error is specfuse's own ValueError that names the class or an argument."""
    frames = traceback.extract_tb(error.__traceback__)
    own = bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)
    named = (
        type(model).__name__,
        "attn_implementation",
        "input_ids",
        "attention_mask",
        "position_ids",
        "encoder_",
    )
    return own and isinstance(error, ValueError) and any(word in str(error) for word in named)


def summed_up(outcome: Outcome, unequal: list[str]) -> Outcome:
    """The worst of the comparisons decides."""
    found = outcome.comparisons
    remarks = [outcome.detail] if outcome.detail else []
    outcome.accepted = sum(c.accepted for c in found if c.drafter == "tree")
    verdicts = {c.verdict for c in found}
    if not found:
        outcome.outcome, outcome.detail = "not comparable", "; ".join(unequal)
        return outcome
    bad = [verdict for verdict in ("wrong", "error") if verdict in verdicts]
    if bad:
        outcome.outcome = bad[0]
        remarks = [_listed([c for c in found if c.verdict == verdict]) for verdict in bad] + remarks
    else:
        refused = [c for c in found if c.verdict == "refused"]
        tried = [c for c in found if c.drafter == "tree" and c.verdict == "equal"]
        plain = [c for c in tried if not c.accepted]
        if len(refused) == len(found):
            outcome.outcome = "refused"
        elif len(plain) == len(tried):
            outcome.outcome = "plain only"
        else:
            outcome.outcome = "equal"
            remarks += [f"plain only: {', '.join(c.prompt for c in plain)}"] if plain else []
        if refused:
            remarks.insert(0, _listed(refused))
        remarks += sorted({c.warning for c in plain if c.warning})[:1]
    outcome.detail = "; ".join([*remarks, *unequal])
    return outcome


def _listed(comparisons: list[Comparison]) -> str:
    """Which prompts with which drafters, by what was said of them."""
    by_prompt: dict[str, list[str]] = {}
    for c in comparisons:
        by_prompt.setdefault(c.prompt, []).append(c.drafter)
    every = all(len(drafters) == len(DRAFTERS) for drafters in by_prompt.values())
    where = [p if every else f"{p} ({', '.join(d)})" for p, d in by_prompt.items()]
    return f"{', '.join(where)}: {comparisons[0].detail}"


class _Logged(logging.Handler):
    """Collects what the package logs while it is open."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> _Logged:
        logging.getLogger("specfuse").addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("specfuse").removeHandler(self)
