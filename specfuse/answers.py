"""The rows being written: emitted tokens, when a row is finished, what the streamer sees.

Follows ``model.generate`` to the token: end-of-sequence ids, maximum length and every stopping criterion are
looked at after each token, and a finished row is padded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria


class Answers:
    """B growing rows.

    Args:
        input_ids: ``[B, P]`` prompt ids, left padded (P may be 0 for prompts given as embeddings).
        criteria: Hugging Face's prepared stopping criteria.
        config: the prepared generation config (pad id, maximum length).
        streamer: gets each column of tokens once every row has it, or None.
    """

    def __init__(
        self,
        input_ids: Tensor,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: Any = None,
    ):
        self.input_ids = input_ids
        self.prompts: list[list[int]] = input_ids.tolist()
        self.answers: list[list[int]] = [[] for _ in self.prompts]
        self.finished = [False] * len(self.prompts)
        self.streamer = streamer
        self.streamed = 0
        if streamer is not None:
            streamer.put(input_ids.cpu())
        self.eos: set[int] = set()
        self.max_length = config.max_length
        self.others = StoppingCriteriaList()
        for criterion in criteria:
            if isinstance(criterion, EosTokenCriteria):
                self.eos |= set(criterion.eos_token_id.tolist())
            elif isinstance(criterion, MaxLengthCriteria):
                self.max_length = min(self.max_length, criterion.max_length)
            else:
                self.others.append(criterion)
        self.has_eos = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        pad = config._pad_token_tensor
        self.pad = 0 if pad is None else int(pad.flatten()[0])

    @property
    def running(self) -> list[bool]:
        """Rows that still emit.

        Without an end-of-sequence id Hugging Face lets finished rows run on until the last one finishes.
        """
        if self.has_eos:
            return [not done for done in self.finished]
        goal = self.width
        return [not done or len(row) < goal for done, row in zip(self.finished, self.answers, strict=True)]

    @property
    def width(self) -> int:
        """Columns of the result so far: the step at which the last row finishes."""
        return max((len(row) for row in self.answers), default=0)

    def remaining(self) -> list[int]:
        """Tokens each row may still emit before the maximum length."""
        prompt = self.input_ids.shape[1]
        return [max(self.max_length - prompt - len(row), 0) for row in self.answers]

    def sequence(self, row: int) -> list[int]:
        """Prompt (padding included) and answer of a row: what logits processors and criteria are shown."""
        return self.prompts[row] + self.answers[row]

    def append(self, row: int, tokens: list[int], width: int) -> int:
        """Adds the tokens of one pass; returns how many were added.

        A row takes them up to where it finishes, a finished one that runs on (see ``running``) up to
        ``width``.
        """
        if tokens and not self.finished[row] and not len(self.others):
            return self._append_plain(row, tokens)
        for count, token in enumerate(tokens, start=1):
            self.answers[row].append(token)
            if self.finished[row]:
                if len(self.answers[row]) >= width:
                    return count
            elif self._finishes(row, token):
                self.finished[row] = True
                return count
        return len(tokens)

    def _append_plain(self, row: int, tokens: list[int]) -> int:
        """``append`` where only the maximum length and end-of-sequence ids can finish the row."""
        answer = self.answers[row]
        # A row that is still running takes a token, whatever the maximum length says.
        room = max(self.max_length - len(self.prompts[row]) - len(answer), 1)
        count = min(len(tokens), room)
        if not self.eos.isdisjoint(tokens):
            count = min(count, 1 + next(i for i, token in enumerate(tokens) if token in self.eos))
        answer += tokens[:count]
        self.finished[row] = count == room or answer[-1] in self.eos
        return count

    def _finishes(self, row: int, token: int) -> bool:
        length = len(self.prompts[row]) + len(self.answers[row])
        done = token in self.eos or length >= self.max_length
        if len(self.others):
            ids = torch.tensor([self.sequence(row)], dtype=torch.int64, device=self.input_ids.device)
            done |= bool(torch.as_tensor(self._criteria(ids)).any())
        return done

    def _criteria(self, ids: Tensor) -> Any:
        try:
            return self.others(ids, None)
        except (TypeError, AttributeError) as error:
            raise ValueError(
                "stopping_criteria: a criterion failed with scores=None; criteria that read scores are not "
                f"supported, use model.generate ({type(error).__name__}: {error})"
            ) from error

    def stream(self) -> None:
        """Hands the streamer every column that all rows have reached."""
        if self.streamer is None:
            return
        ready = min(
            (
                self.width if done and self.has_eos else len(row)
                for row, done in zip(self.answers, self.finished, strict=True)
            ),
            default=0,
        )
        for column in range(self.streamed, ready):
            self.streamer.put(
                torch.tensor([row[column] if column < len(row) else self.pad for row in self.answers])
            )
        self.streamed = max(self.streamed, ready)

    def sequences(self) -> Tensor:
        """``[B, P + T]`` int64, finished rows padded: what ``model.generate`` returns."""
        width = self.width
        rows = [row + [self.pad] * (width - len(row)) for row in self.answers]
        answer = torch.tensor(rows, dtype=self.input_ids.dtype, device=self.input_ids.device)
        return torch.cat([self.input_ids, answer.reshape(len(rows), width)], dim=1)
