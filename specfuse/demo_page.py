"""The demo as one HTML file: frames, what an event camera saw, and answers with accepted drafts coloured."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from specfuse.data.world import events
from specfuse.demo import GENERATE, LOOKUP, SPECFUSE, SYSTEMS, Answered, AskedClip, DemoResult
from specfuse.events import render_eventgpt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>specfuse demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ width: 100%; image-rendering: pixelated; display: block; margin: 2px 0; }}
img.events {{ width: 62.5%; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2rem .8rem; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }}
.draft {{ background: #c8efcf; }}
.own {{ background: #ffd9b8; }}
.question {{ font-weight: 600; margin-bottom: 0; }}
.figures {{ color: #666; font-size: 85%; margin-top: 0; }}
</style>
<h1>{speedup:.1f}x faster, {verdict}</h1>
<p>Median of {questions} questions about {clips} clips that were never trained on, each timed from frames and
question to the last token; on {about}.</p>
<table>
<tr><th>system</th><th>tokens/s</th><th>tokens per pass</th><th>specfuse is faster by</th></tr>
{rows}
</table>
<p><span class="draft">Accepted drafts</span> cost no pass of their own;
<span class="own">these tokens</span> the target added itself, one per pass.</p>
{body}
</html>
"""


def write_page(
    result: DemoResult, clips: Sequence[AskedClip], tokenizer: PreTrainedTokenizerBase, about: str
) -> str:
    """The page's text.

    Args:
        result: of the demo.
        clips: that were asked about.
        tokenizer: of the model.
        about: versions and hardware, for the reader.
    """
    verdict = "the same tokens" if result.identical else "but NOT the same tokens"
    return PAGE.format(
        speedup=result.speedup(GENERATE),
        verdict=verdict,
        questions=len(result.answered),
        clips=len(clips),
        about=html.escape(about),
        rows="\n".join(_row(result, system) for system in SYSTEMS),
        body="\n".join(_clip(clip, result, tokenizer) for clip in clips),
    )


def _row(result: DemoResult, system: str) -> str:
    faster = f"{result.speedup(system):.2f}x" if system in (GENERATE, LOOKUP) else ""
    cells = (f"{result.tokens_per_second(system):.0f}", f"{result.tokens_per_pass(system):.2f}", faster)
    return f"<tr><td>{system}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _clip(clip: AskedClip, result: DemoResult, tokenizer: PreTrainedTokenizerBase) -> str:
    seen = render_eventgpt(events(clip.index))
    answers = [each for each in result.answered if each.index == clip.index]
    return "\n".join(
        [
            f"<h2>Clip {clip.index}</h2>",
            f'<img alt="8 frames of the clip" src="{_png(clip.frames)}">',
            f'<img class="events" alt="events of the clip" src="{_png(seen)}">',
            *(_answer(each, tokenizer) for each in answers),
        ]
    )


def _answer(answered: Answered, tokenizer: PreTrainedTokenizerBase) -> str:
    timed = answered.timed[SPECFUSE]
    flags = answered.stats.from_drafts[0]
    spans = [
        f'<span class="{"draft" if drafted else "own"}">{html.escape(text)}</span>'
        for text, drafted in coloured(timed.tokens, flags, tokenizer)
    ]
    times = ", ".join(f"{name} {answered.timed[name].seconds * 1e3:.0f} ms" for name in SYSTEMS)
    return (
        f'<p class="question">{html.escape(answered.question.text)}</p>\n<p>{"".join(spans)}</p>\n'
        f'<p class="figures">{len(timed.tokens)} tokens in {timed.passes} passes; {times}</p>'
    )


def coloured(
    tokens: Sequence[int], drafted: Sequence[bool], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """Pieces of an answer's text and whether each was drafted; special tokens are left out.

    Text is what each token adds to the text of those before it: a character may take several tokens.
    """
    pieces: list[tuple[str, bool]] = []
    before = ""
    for count, flag in enumerate(drafted, start=1):
        text = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue  # the character goes on in the next token
        if len(text) > len(before):
            pieces.append((text[len(before) :], flag))
        before = text
    return pieces


def _png(pictures: Sequence[np.ndarray] | np.ndarray) -> str:
    """Pictures ``[H, W, 3]`` uint8 side by side, as a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(list(pictures), axis=1)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
