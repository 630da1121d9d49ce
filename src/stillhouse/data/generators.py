"""The CPU's global random generators, borrowed and given back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class GeneratorsAside:
    """Context: torch's CPU generator, ``random`` and ``numpy.random`` can be seeded inside and are as before after."""

    def __enter__(self) -> GeneratorsAside:
        self._states: tuple[Any, ...] = (
            torch.get_rng_state(),
            random.getstate(),
            np.random.get_state(),
        )
        return self

    def seed(self, seed: int) -> None:
        """Seed all three."""
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def __exit__(self, *exc: object) -> None:
        own, python, numpy = self._states
        torch.set_rng_state(own)
        random.setstate(python)
        np.random.set_state(numpy)
