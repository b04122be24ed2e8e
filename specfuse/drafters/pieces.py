"""What the ids of a tokenizer spell: the common ground of two vocabularies is bytes of text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LONGEST_CONTEXT = 48
"""Bytes of the text before that splitting the text behind may depend on."""


class Pieces:
    """The pieces of text behind a tokenizer's ids, as they read in the middle of a text.

    What an id spells is seen from what the tokenizer decodes: it is the same for byte-level BPE (``Ġ``),
    SentencePiece (``▁``) and WordPiece (``##``). Ids that are no valid text by themselves are the bytes that
    they stand for.

    Args:
        tokenizer: of transformers.

    Raises:
        ValueError: something that is no tokenizer; when it is first read, one that spells no text.
    """

    def __init__(self, tokenizer: Any):
        if not hasattr(tokenizer, "get_vocab") or not hasattr(tokenizer, "decode"):
            raise ValueError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
        self.tokenizer = tokenizer
        self.begin, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {
            token for token, entry in added.items() if entry.special and not _BYTE.fullmatch(str(entry))
        }
        self.special = frozenset(special | set(tokenizer.all_special_ids))
        self.names: dict[str, int] = tokenizer.get_vocab()
        self.added = frozenset(tokenizer.get_added_vocab())

    @cached_property
    def spelled(self) -> list[bytes | None]:
        """Per id, the bytes it stands for behind other text; None for special tokens and gaps."""
        name_of = {token: name for name, token in self.names.items()}
        known = [token for token in sorted(name_of) if token not in self.special]
        anchor, before = self._anchor(known)
        # Behind an anchor no decoder takes a space away.
        texts = self._decode([[anchor, token] for token in known])
        found: list[bytes | None] = [None] * (max(name_of, default=-1) + 1)
        for token, text in zip(known, texts, strict=True):
            if text.startswith(before) and "\ufffd" not in text:
                found[token] = text[len(before) :].encode() or None
            else:
                found[token] = _bytes_of(name_of[token])
        return found

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The id of each piece; of several the lowest that is no byte fallback."""
        name_of = {token: name for name, token in self.names.items()}
        order = [token for token, piece in enumerate(self.spelled) if piece is not None]
        order.sort(key=lambda token: _BYTE.fullmatch(name_of[token]) is not None)
        found: dict[bytes, int] = {}
        for token in order:
            found.setdefault(self.spelled[token] or b"", token)
        return found

    @property
    def decoder(self) -> object:
        """What tells two ways of reading the same names apart."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self
        return None if backend.decoder is None else backend.decoder.__getstate__()

    def spell(self, ids: Sequence[int]) -> bytes:
        """The text of ids, special tokens left out."""
        spelled, count = self.spelled, len(self.spelled)
        return b"".join([spelled[token] or b"" for token in ids if 0 <= token < count])

    def encode(self, text: bytes) -> list[int]:
        """Ids of a text as the tokenizer splits it, without special tokens around it."""
        found: list[int] = self.tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False)
        return found

    def first(self, text: bytes) -> list[int]:
        """Ids of a text that stands first: spelled exactly where the tokenizer can."""
        without = text.removeprefix(b" ")
        for candidate in (text, without):
            found = self.encode(candidate)
            if self.spell(found) == text:
                return found
        return self.encode(without)

    def after(self, before: bytes, text: bytes) -> list[int]:
        """Ids of a text that goes on behind another one, without what can not be spelled at its end.

        Splitting is not concatenative: both are split together. Where no piece begins with ``text``, it is
        spelled by the longest pieces that fit.
        """
        if not text:
            return []
        found = self.encode(_tail(before) + text)
        missing, start = len(text), len(found)
        while missing > 0 and start > 0:
            start -= 1
            piece = self.spelled[found[start]]
            if piece is None:
                return self.longest(text)
            missing -= len(piece)
        exact = missing == 0 and self.spell(found[start:]) == text
        return found[start:] if exact else self.longest(text)

    def longest(self, text: bytes) -> list[int]:
        """The longest pieces, one after the other, as far as there are any."""
        found, place = [], 0
        while place < len(text):
            ends = range(min(len(text), place + self._widest), place, -1)
            token = next((self.ids[text[place:end]] for end in ends if text[place:end] in self.ids), None)
            if token is None:
                break
            found.append(token)
            place += len(self.spelled[token] or b"")
        return found

    @cached_property
    def _widest(self) -> int:
        return max(map(len, self.ids))

    def _anchor(self, known: list[int]) -> tuple[int, str]:
        """An id that is a word of its own, and how it reads."""
        texts = self._decode([[token] for token in known])
        for token, text in zip(known, texts, strict=True):
            if text.strip().isascii() and text.strip().isalnum():
                return token, text
        raise ValueError(f"tokenizer {type(self.tokenizer).__name__} spells no text")

    def _decode(self, rows: list[list[int]]) -> list[str]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            texts: list[str] = backend.decode_batch(rows, skip_special_tokens=False)
            return texts
        return [self.tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]


def whole_characters(text: bytes) -> bytes:
    """The text without the first bytes of a character at its end."""
    for cut in range(1, min(4, len(text)) + 1):
        lead = text[-cut]
        if lead >= 0xC0:
            needed = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return text[:-cut] if needed > cut else text
        if lead < 0x80:
            break
    return text


def _tail(text: bytes) -> bytes:
    tail = text[-_LONGEST_CONTEXT:]
    # A cut in the middle of a character or a word would split it in another way.
    start = 0 if len(tail) == len(text) else max(tail.find(b" "), 0)
    return tail[start:].decode(errors="ignore").encode()


def _bytes_of(name: str) -> bytes | None:
    """The bytes of a token that is no text by itself: ``<0xE4>``, or in byte-level BPE's alphabet."""
    if match := _BYTE.fullmatch(name):
        return bytes([int(match[1], 16)])
    if all(letter in _BYTE_LETTERS for letter in name):
        return bytes(_BYTE_LETTERS[letter] for letter in name)
    return None


def _byte_letters() -> dict[str, int]:
    """The letters in which GPT-2's byte-level BPE writes the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_LETTERS = _byte_letters()
