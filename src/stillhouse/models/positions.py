"""Which logits belong to which labels: one rule for losses and measurements, for classifiers and for sequence models."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.models.calling import unwrapped

IGNORED = -100
"""The label of positions that do not count."""


def targets(
    module: nn.Module, batch: Mapping[str, Tensor], *, next_token: bool = False
) -> Shaped[Tensor, "batch *positions"]:
    """The labels of a batch, each at the place of the logits that predict it.

    Labels of whole samples (classes, soft labels, regression targets) are returned as they are. Of labels per position
    it is decided here, and nowhere else, what stands where and what counts:

    - A causal language model predicts the label of the *next* position: its labels move one position to the front. A
      batch without ``labels`` is labelled with its own ``input_ids``.
    - Every other model predicts at the label's own position: encoder-decoders (whose decoder reads the labels shifted
      right, see :func:`stillhouse.models.forward`), masked language models, token classifiers.
    - ``-100`` marks what does not count: what is so labelled; padding, where the batch has the attention mask that
      belongs to the labels (``decoder_attention_mask`` for an encoder-decoder); and for causal models the predictions
      made at padding.

    So the logits stay where they are: ``cross_entropy(logits(module, batch), targets(module, batch))`` is the loss of
    transformers, and ``targets(module, batch) != -100`` is the mask of every other loss.

    Args:
        module: the model. Those of transformers say what they are: what generates and is no encoder-decoder is causal.
        batch: its batch.
        next_token: whether to take for causal a model that does not say (see :attr:`stillhouse.data.Data.next_token`).

    Returns:
        Labels with the shape of the logits without their classes; for labels per position with -100 where none counts.

    Raises:
        UserError: there are no labels and the model is not causal.

    >>> import torch
    >>> targets(nn.Identity(), {"input_ids": torch.tensor([[5, 6, 7, 0]])}, next_token=True)
    tensor([[   6,    7,    0, -100]])
    >>> batch = {"input_ids": torch.tensor([[5, 6, 7, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    >>> targets(nn.Identity(), batch, next_token=True)
    tensor([[   6,    7, -100, -100]])
    """
    decoder_reads = "decoder_input_ids" in batch or is_encoder_decoder(module)
    shifts = not decoder_reads and _is_causal(module, next_token)
    labels = batch.get("labels")
    if labels is None:
        if not shifts or "input_ids" not in batch:
            raise UserError(
                f"This batch has no labels, which {type(unwrapped(module)).__name__} needs; it holds {', '.join(batch)}."
            )
        labels = batch["input_ids"]
    if labels.ndim != 2 or labels.is_floating_point():
        return labels
    mask = batch.get("decoder_attention_mask" if decoder_reads else "attention_mask")
    padding = mask == 0 if mask is not None and mask.shape == labels.shape else None
    if padding is not None:
        labels = labels.masked_fill(padding, IGNORED)
    if shifts:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if padding is not None:
            labels = labels.masked_fill(padding, IGNORED)
    return labels


def is_encoder_decoder(module: nn.Module) -> bool:
    """Whether a model says of itself that its logits are those of a decoder with inputs of its own."""
    return bool(getattr(getattr(unwrapped(module), "config", None), "is_encoder_decoder", False))


def _is_causal(module: nn.Module, otherwise: bool) -> bool:
    can_generate = getattr(unwrapped(module), "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else otherwise
