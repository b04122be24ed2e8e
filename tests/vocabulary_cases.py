"""Small tokenizers of every family, and models that know the same few answers by heart in each of them."""

from __future__ import annotations

import copy
import functools
import json
import random
from typing import Any

import torch
from tiny_models import EOS, tiny_llama
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import specfuse
from specfuse.data.world import clip
from specfuse.drafters.pieces import Pieces
from specfuse.drafters.vocabulary import shared

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
OTHER_TEXT = "Grüße aus 東京 🚗!"
FAMILIES = ("bytes", "fewer bytes", "sentencepiece", "wordpiece", "unigram")
ASKED = 4


@functools.cache
def texts() -> list[str]:
    return [f"Q: {q.text} A: {q.long}" for index in range(3) for q in clip(index).questions] + [OTHER_TEXT]


@functools.cache
def dialogue() -> list[tuple[str, str]]:
    """Questions and the answers that the models below know."""
    return [(f"Q: {q.text} A:", f" {q.long}") for q in clip(1).questions[:ASKED]]


@functools.cache
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    core = {
        "bytes": lambda: _byte_level(700),
        "fewer bytes": lambda: _byte_level(320),
        "sentencepiece": _sentencepiece,
        "wordpiece": _wordpiece,
        "unigram": _unigram,
    }[family]()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _byte_level(size: int) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts(), trainer)
    return core


def _sentencepiece() -> Tokenizer:
    """As LLaMA's: ``▁``, and ``<0x..>`` for bytes of what is not in the vocabulary."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    core.train_from_iterator([text for text in texts() if text.isascii()], trainer)
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted(core.get_vocab(), key=core.get_vocab().get)
    merges = [tuple(pair) for pair in _saved(core)["merges"]]
    model = models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def _wordpiece() -> Tokenizer:
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    core.train_from_iterator(texts(), trainer)
    return core


def _unigram() -> Tokenizer:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(texts(), trainer)
    return core


def _saved(core: Tokenizer) -> dict[str, Any]:

    return json.loads(core.to_str())["model"]


@functools.cache
def order(family: str) -> tuple[int, ...]:
    """A new id for each of a tokenizer's, special tokens in their places."""
    ids = list(range(len(SPECIAL), len(tokenizer(family))))
    random.Random(0).shuffle(ids)
    return (*range(len(SPECIAL)), *ids)


def permuted(family: str) -> PreTrainedTokenizerFast:
    """The same tokenizer with other ids."""
    made = _permuted_json(family)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(made),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def _permuted_json(family: str) -> str:

    saved = json.loads(tokenizer(family).backend_tokenizer.to_str())
    known = saved["model"]["vocab"]
    if isinstance(known, list):
        saved["model"]["vocab"] = [entry for _, entry in sorted(zip(order(family), known, strict=True))]
    else:
        moved = {name: order(family)[token] for name, token in known.items()}
        saved["model"]["vocab"] = dict(sorted(moved.items(), key=lambda entry: entry[1]))
    return json.dumps(saved)


def permuted_model(model: PreTrainedModel, family: str) -> PreTrainedModel:
    """The same model in the ids of :func:`permuted`."""
    twin = copy.deepcopy(model)
    moved = torch.tensor(order(family))
    with torch.no_grad():
        for mine, its in ((twin.model.embed_tokens, model.model.embed_tokens), (twin.lm_head, model.lm_head)):
            mine.weight[moved] = its.weight
    return twin


@functools.cache
def parrot(family: str) -> PreTrainedModel:
    """A model that has learned the answers of :func:`dialogue` by heart, in a tokenizer's ids."""
    tok = tokenizer(family)
    model = tiny_llama(seed=1, vocab=len(tok), layers=1, hidden=64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.3)
    rows = [([1, *tok.encode(q)], [*tok.encode(a), EOS]) for q, a in dialogue()]
    longest = max(len(q) + len(a) for q, a in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for i, (question, answer) in enumerate(rows):
        whole = torch.tensor(question + answer)
        ids[i, : len(whole)], labels[i, len(question) : len(whole)] = whole, whole[len(question) :]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.05, f"{family}: loss {float(loss.detach())} after training"
    return model.eval()


def asked(family: str, index: int = 0) -> dict[str, Any]:
    """A question that the models know, as inputs of one."""
    ids = [1, *tokenizer(family).encode(dialogue()[index][0])]
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}


def main() -> None:
    """Prints tokens per pass of every pair: ``PYTHONPATH=. python tests/vocabulary_cases.py``."""
    print("| target | drafter | shared | intersection | string |\n|---|---|---|---|---|")
    for target in FAMILIES:
        for drafter in FAMILIES:
            part = shared(Pieces(tokenizer(target)), Pieces(tokenizer(drafter)))
            found = [_tokens_per_pass(target, drafter, kind) for kind in ("intersection", "string")]
            print(f"| {target} | {drafter} | {part:.2f} | {found[0]:.2f} | {found[1]:.2f} |")


def _tokens_per_pass(target: str, drafter: str, kind: str) -> float:
    tokenizers = {"tokenizer": tokenizer(drafter), "target_tokenizer": tokenizer(target)}
    draft = specfuse.ModelDrafter(parrot(drafter), vocabulary=kind, **tokenizers)
    generator, tokens, passes = specfuse.SpeculativeGenerator(parrot(target), draft), 0, 0
    for index in range(ASKED):
        options = asked(target, index) | {"max_new_tokens": 80, "do_sample": False}
        assert torch.equal(generator.generate(**options), parrot(target).generate(**options))
        tokens += generator.last_stats.tokens
        passes += generator.last_stats.passes
    return tokens / passes


if __name__ == "__main__":
    main()
