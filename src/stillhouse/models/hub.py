"""Models of transformers: pretrained from a hub id or a directory, or with random weights from a config."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from safetensors import SafetensorError
from torch import nn

from stillhouse.errors import UnreachableError, UserError, nearest
from stillhouse.facts import Facts
from stillhouse.models.spec import ModelSpec, on_meta, sentence

HubTask = Literal["auto", "classification", "token-classification", "masked-lm", "causal-lm", "seq2seq", "base"]

_AUTO_CLASSES: dict[str, str] = {
    "token-classification": "AutoModelForTokenClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "base": "AutoModel",
}

# Arguments of from_pretrained and from_config that are not fields of a config.
_LOADING = ("attn_implementation", "device_map", "experts_implementation", "quantization_config", "subfolder", "token")


class HubSpec(ModelSpec):
    """A model of transformers; text form ``hf:owner/name`` or ``hf:./directory``.

    Give either ``name`` (pretrained weights) or ``config`` (random weights).
    """

    kind = "hf"

    name: str | None = None
    """Hub id ('owner/name') or local directory of pretrained weights."""
    config: dict[str, Any] | str | None = None
    """For random weights: a mapping with 'model_type', or a path to a config.json (or a directory with one). A mapping
    without 'vocab_size' takes the data's, where that is known."""
    task: HubTask = "auto"
    """Which head. 'auto': as the data's task (classes: 'classification'; language: 'seq2seq' for encoder-decoders, else
    'causal-lm'; no labels: 'base')."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Data type of the weights; 'auto' takes the stored one."""
    trust_remote_code: bool = False
    """Run Python code that the repository brings along."""
    overrides: dict[str, Any] = {}
    """Fields of the config to change, and 'attn_implementation', 'quantization_config' and other loading arguments."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        if not text:
            raise ValueError("'hf' needs a model, as in 'hf:owner/name'")
        return cls(name=text)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either 'name' (pretrained weights) or 'config' (random weights)")
        if isinstance(self.config, dict) and "model_type" not in self.config:
            raise ValueError("'config' needs 'model_type', such as 'bert'")
        return self

    def build(self, facts: Facts) -> nn.Module:
        local = (self.name or "").startswith(("./", "../", "/", "~"))
        if local and not Path(str(self.name)).expanduser().is_dir():
            raise UserError(f"There is no model directory {self.name!r}; give a directory that exists or a hub id.")
        library = transformers()
        loading = {key: value for key, value in self.overrides.items() if key in _LOADING}
        loading["trust_remote_code"] = self.trust_remote_code
        source = self._source()
        try:
            config = self._config(library, source)
            self._fit_vocabulary(config, facts)
            auto = getattr(library, self._auto_class(config, facts))
            if not self.trust_remote_code and type(config) not in auto._model_mapping:
                raise UserError(
                    f"The model {self._shown()} is a {config.model_type!r}, of which transformers has no {auto.__name__}; "
                    f"choose another 'task'."
                )
            resized = "Classification" in auto.__name__ and _fit_head(config, facts, new=self.config is not None)
            if self.config is not None or on_meta():
                loading.pop("device_map", None)
                module = auto.from_config(config, **loading)
                if self.dtype != "auto":
                    module = module.to(getattr(torch, self.dtype))
            else:
                dtype = "auto" if self.dtype == "auto" else getattr(torch, self.dtype)
                loading |= {"revision": self.revision, "dtype": dtype, "ignore_mismatched_sizes": resized}
                module = auto.from_pretrained(source, config=config, **loading)
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
            # What cannot be found is no mistake of the recipe's.
            kind = UnreachableError if isinstance(error, OSError) else UserError
            raise kind(f"The model {self._shown()} could not be made: {reason}.") from error
        built: nn.Module = module.train()
        return built

    def _shown(self) -> str:
        if self.name is not None:
            return repr(f"hf:{self.name}")
        return f"of the config {self.config!r}" if isinstance(self.config, str) else "of the given config"

    def _source(self) -> str | None:
        if self.name is None:
            return None
        looks_local = self.name.startswith((".", "/", "~"))
        path = Path(self.name).expanduser()
        if looks_local and not path.is_dir():
            raise UnreachableError(
                f"There is no model directory {self.name!r}; give a directory that exists or a hub id."
            )
        return str(path) if path.is_dir() else self.name

    def _config(self, library: Any, source: str | None) -> Any:
        """The config with the overrides in it."""
        changes = {key: value for key, value in self.overrides.items() if key not in _LOADING}
        if isinstance(self.config, dict):
            fields = dict(self.config)
            model_type = str(fields.pop("model_type"))
            if model_type not in library.CONFIG_MAPPING:
                hint = nearest(model_type, library.CONFIG_MAPPING)
                hint = hint if hint.endswith("?") else "see the models of transformers"
                raise UserError(sentence(f"transformers has no model_type {model_type!r}; {hint}"))
            config = library.AutoConfig.for_model(model_type, **fields)
            _refuse_typos(fields, type(config)())
        else:
            where = source
            if self.config is not None:
                path = Path(self.config).expanduser()
                path = path / "config.json" if path.is_dir() else path
                if not path.is_file():
                    raise UserError(f"There is no config file {self.config!r}; give a path to a config.json.")
                if "model_type" not in json.loads(path.read_text(encoding="utf-8")):
                    raise UserError(f"The config file {self.config!r} has no 'model_type', such as 'bert'.")
                where = str(path.parent) if path.name == "config.json" else str(path)
            config = library.AutoConfig.from_pretrained(
                where, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        _refuse_typos(changes, config)
        for key, value in changes.items():
            setattr(config, key, value)
        return config

    def _fit_vocabulary(self, config: Any, facts: Facts) -> None:
        """Give a new config the data's vocabulary, unless it names one; refuse one that the data's ids exceed."""
        text = config.get_text_config()
        size, wanted = getattr(text, "vocab_size", None), facts.vocabulary_size
        if size is None or wanted is None:
            return
        if isinstance(self.config, dict) and "vocab_size" not in {**self.config, **self.overrides}:
            text.vocab_size = wanted
        elif size < wanted:
            hint = "use its own tokenizer" if self.config is None else f"set its 'vocab_size' to {wanted} or more"
            raise UserError(
                f"The model {self._shown()} has a vocabulary of {size} tokens, but the data has ids up to {wanted - 1}; "
                f"{hint}."
            )

    def _auto_class(self, config: Any, facts: Facts) -> str:
        task = self.task
        if task == "auto":
            if facts.task == "language":
                task = "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal-lm"
            else:
                task = "base" if facts.task == "unlabelled" else "classification"
        if task != "classification":
            return _AUTO_CLASSES[task]
        if "pixel_values" in facts.inputs:
            return "AutoModelForImageClassification"
        if "input_values" in facts.inputs or "input_features" in facts.inputs:
            return "AutoModelForAudioClassification"
        return "AutoModelForSequenceClassification"


def _fit_head(config: Any, facts: Facts, *, new: bool) -> bool:
    """Set the number of labels from the facts; whether the stored head (if any) had another size."""
    count = facts.num_classes
    if facts.task == "regression":
        config.problem_type = "regression"
        count = count or 1
    resized = count is not None and config.num_labels != count
    if resized:
        config.num_labels = count
    if len(facts.class_names) == count and (resized or new):
        config.id2label = dict(enumerate(facts.class_names))
        config.label2id = {name: index for index, name in enumerate(facts.class_names)}
    return resized


def _refuse_typos(fields: Iterable[str], config: Any) -> None:
    """Refuse names that all but spell a field: configs take any name in silence, and some proper ones are undeclared."""
    known = [name for name in vars(config) if not name.startswith("_")]
    for key in fields:
        if not hasattr(config, key) and (close := difflib.get_close_matches(key, known, n=1, cutoff=0.85)):
            raise UserError(f"A config of {config.model_type!r} has no field {key!r}; did you mean {close[0]!r}?")


def transformers() -> Any:
    """The transformers library, imported when first needed."""
    return _optional("transformers", "language")


def diffusers() -> Any:
    """The diffusers library, imported when first needed."""
    return _optional("diffusers", "generators")


def _optional(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(f"This model needs {name}; install it with: pip install 'stillhouse[{extra}]'.") from None
