"""Text columns as token ids of one length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.spec import Spec

Tokenize = Callable[[Sequence[str]], dict[str, Tensor]]


class TextFields(Spec):
    """Fields of sources whose inputs may be text."""

    text_column: str | None = None
    """Column of text to read as ``input_ids``; needs ``tokenizer``."""
    tokenizer: str | None = None
    """Hub id or directory of a Hugging Face tokenizer, or "bytes" (UTF-8 bytes plus one, 0 is padding)."""
    max_length: int = Field(128, ge=1)
    """Tokens per sample; longer texts are cut, shorter ones padded."""

    @model_validator(mode="after")
    def _both(self) -> TextFields:
        if self.text_column is not None and self.tokenizer is None:
            raise ValueError(f"text_column {self.text_column!r} needs a tokenizer: a hub id, a directory, or 'bytes'")
        return self

    def tokenize(self) -> Tokenize:
        """The function from texts to ``input_ids`` and ``attention_mask`` of shape (texts, max_length)."""
        if self.tokenizer == "bytes":
            return ByteTokenize(self.max_length)
        return HubTokenize(str(self.tokenizer), self.max_length)


class ByteTokenize:
    """UTF-8 bytes as ids 1 .. 256, padded with 0."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        ids = torch.zeros(len(texts), self.max_length, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            encoded = text.encode()[: self.max_length]
            if encoded:
                row[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).long() + 1
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


class HubTokenize:
    """A Hugging Face tokenizer, loaded on first use in each process."""

    def __init__(self, name: str, max_length: int) -> None:
        self.name, self.max_length = name, max_length
        self._tokenizer: Any = None

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
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
