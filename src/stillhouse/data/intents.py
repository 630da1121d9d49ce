"""Intent classification: what somebody asks an assistant for, read from local files."""

from __future__ import annotations

import json
from typing import ClassVar

from pydantic import Field

from stillhouse.data.dataset import Data
from stillhouse.data.files import Files, LocalFiles
from stillhouse.data.sources import Memory
from stillhouse.data.tables import as_classes
from stillhouse.data.text import Tokens
from stillhouse.errors import UnreachableError, UserError

Utterances = dict[str, list[tuple[str, str]]]

SPLITS = {"train": "train", "validation": "val", "test": "test"}
"""What the file calls the splits. Its out-of-scope ones, ``oos_train`` and so on, are not read."""


class CLINC150(Tokens, LocalFiles):
    """Short requests in 150 intents, 15 000 / 3 000 / 4 500, official splits, in-scope only (arXiv 1909.02027)."""

    kind: ClassVar[str] = "clinc150"
    folders: ClassVar[tuple[str, ...]] = ("clinc150", "oos-eval/data", "clinc150/data")
    origin: ClassVar[str] = "data/data_full.json of https://github.com/clinc/oos-eval"
    sums: ClassVar[dict[str, tuple[str, ...]]] = {
        "data_full.json": ("36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0",)
    }

    tokenizer: str = "words"
    """Hub id or directory of a Hugging Face tokenizer, "words" or "bytes"; the longest request has 30 words."""
    max_length: int = Field(32, ge=1, le=2**20)
    """Tokens per sample; longer texts are cut, shorter ones padded."""

    def load(self) -> Data:
        files = Files(self)
        content = files.read("data_full.json")
        if content is None:
            raise UnreachableError(files.missing())
        parts = _utterances(content)
        if parts is None:
            raise UserError(f"{files.find('data_full.json')} does not hold pairs of text and intent; get it again.")
        labels, class_names = as_classes({name: [intent for _, intent in part] for name, part in parts.items()})
        tokenize = self.tokenize(text for text, _ in parts["train"])
        sources = {
            name: Memory({**tokenize([text for text, _ in part]), "labels": labels[name]})
            for name, part in parts.items()
        }
        return self.assemble(sources, files.read_sums, class_names=class_names, tokenize=tokenize)


def _utterances(content: bytes) -> Utterances | None:
    """Pairs of text and intent by split; ``None`` if the file is built otherwise."""
    try:
        whole = json.loads(content)
        parts = {ours: [(text, intent) for text, intent in whole[theirs]] for ours, theirs in SPLITS.items()}
    except (ValueError, KeyError, TypeError):
        return None
    texts = all(isinstance(item, str) for part in parts.values() for pair in part for item in pair)
    return parts if texts and all(parts.values()) else None
