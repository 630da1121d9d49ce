"""Text columns as token ids of one length."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.spec import Spec

WORDS = re.compile(r"\w+|[^\w\s]")
"""What the tokenizer "words" takes for a token: a run of letters, digits and underscores, or one other visible character."""


class Tokenize(ABC):
    """From texts to ids.

    Attributes:
        vocabulary_size: ids are smaller than this; ``None`` where that is not known.
        sums: hashes of what was learned from the texts, for the fingerprint of a data set.
    """

    vocabulary_size: int | None = None
    sums: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, texts: Sequence[str]) -> dict[str, Int[Tensor, "texts max_length"]]:
        """``input_ids``, and ``attention_mask`` with 1 where there is a token."""


class Tokens(Spec):
    """Fields that say how text becomes ids."""

    tokenizer: str | None = None
    """Hub id or directory of a Hugging Face tokenizer; "words" (lower-cased words and punctuation marks of the training
    split, most frequent first; 0 is padding, 1 any other word); or "bytes" (UTF-8 bytes plus one, 0 is padding)."""
    max_length: int = Field(128, ge=1, le=2**20)
    """Tokens per sample; longer texts are cut, shorter ones padded."""
    vocabulary_size: int = Field(30_000, ge=3)
    """Most ids of the tokenizer "words", padding and the unknown word among them."""

    def tokenize(self, training_texts: Iterable[str]) -> Tokenize:
        """The function from texts to ids; ``training_texts`` are read only where the vocabulary comes from them."""
        match self.tokenizer:
            case "bytes":
                return ByteTokenize(self.max_length)
            case "words":
                return WordTokenize.fitted(training_texts, self.max_length, self.vocabulary_size)
            case _:
                return HubTokenize(str(self.tokenizer), self.max_length)


class TextFields(Tokens):
    """Fields of sources whose inputs may be text."""

    text_column: str | None = None
    """Column of text to read as ``input_ids``; needs ``tokenizer``."""

    @model_validator(mode="after")
    def _both(self) -> TextFields:
        if self.text_column is not None and self.tokenizer is None:
            raise ValueError(
                f"text_column {self.text_column!r} needs a tokenizer: a hub id, a directory, 'words' or 'bytes'"
            )
        return self


class ByteTokenize(Tokenize):
    """UTF-8 bytes as ids 1 .. 256, padded with 0."""

    vocabulary_size = 257

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def __call__(self, texts: Sequence[str]) -> dict[str, Int[Tensor, "texts max_length"]]:
        ids = torch.zeros(len(texts), self.max_length, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            encoded = text.encode()[: self.max_length]
            if encoded:
                row[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).long() + 1
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


class WordTokenize(Tokenize):
    """Lower-cased words and punctuation marks as ids 2 and up, padded with 0; words outside the vocabulary are 1.

    Args:
        vocabulary: words in the order of their ids.
        max_length: tokens per text.

    >>> tokenize = WordTokenize.fitted(["To be, or not to be!"], max_length=5, vocabulary_size=10)
    >>> tokenize.vocabulary
    ('be', 'to', '!', ',', 'not', 'or')
    >>> tokenize(["Be there!"])["input_ids"]
    tensor([[2, 1, 4, 0, 0]])
    """

    def __init__(self, vocabulary: Sequence[str], max_length: int) -> None:
        self.vocabulary, self.max_length = tuple(vocabulary), max_length
        self.vocabulary_size = len(self.vocabulary) + 2
        self.sums = (hashlib.sha256("\n".join(self.vocabulary).encode()).hexdigest(),)
        self._ids = {word: number for number, word in enumerate(self.vocabulary, start=2)}

    @classmethod
    def fitted(cls, texts: Iterable[str], max_length: int, vocabulary_size: int) -> WordTokenize:
        """With the words of ``texts``, most frequent first, then alphabetical; at most ``vocabulary_size`` ids in all."""
        counts = Counter(word for text in texts for word in WORDS.findall(text.lower()))
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ordered[: vocabulary_size - 2], max_length)

    def __call__(self, texts: Sequence[str]) -> dict[str, Int[Tensor, "texts max_length"]]:
        ids = torch.zeros(len(texts), self.max_length, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            found = [self._ids.get(word, 1) for word in WORDS.findall(text.lower())[: self.max_length]]
            row[: len(found)] = torch.tensor(found, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


class HubTokenize(Tokenize):
    """A Hugging Face tokenizer, loaded on first use in each process.

    Its ``vocabulary_size`` stays unknown: some tokenizers count tokens that their own models do not embed.
    """

    def __init__(self, name: str, max_length: int) -> None:
        self.name, self.max_length = name, max_length
        self._tokenizer: Any = None

    def __call__(self, texts: Sequence[str]) -> dict[str, Int[Tensor, "texts max_length"]]:
        if self._tokenizer is None:
            self._tokenizer = self._load()
        encoded = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def _load(self) -> Any:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise UserError("Tokenizers need transformers: pip install 'stillhouse[language]'.") from None
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name)
        except (OSError, ValueError) as error:
            raise UserError(f"tokenizer {self.name!r} could not be loaded: {str(error).splitlines()[0]}") from None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
