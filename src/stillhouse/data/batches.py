"""Batches as a lazy description, and the endless, exactly resumable streams that it opens.

A stream is a pure function of (seed, position): the order of an epoch comes from a generator seeded with
hash(seed, epoch), and step i takes the i-th run of ``batch_size * world`` entries of it, of which each process takes
its own slice. So two processes see exactly the samples of one process with the doubled batch, and a stream is resumed
by its position alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from stillhouse.data.batch import Batch
from stillhouse.data.sources import Memory
from stillhouse.data.splits import number_of
from stillhouse.errors import UserError

if TYPE_CHECKING:
    from stillhouse.data.augment import Augment
    from stillhouse.data.dataset import Split


@dataclass(frozen=True, eq=False)
class Batches:
    """How a split is cut into batches; cheap to make, nothing is read before :meth:`open`.

    Attributes:
        split: where the samples come from.
        batch_size: samples per process and step; ``None`` takes the whole split at once.
        shuffle: a new order each epoch; otherwise the split's own order.
        drop_last: leave out the samples that do not fill a global batch (per epoch, other ones each time).
        augment: applied to ``pixel_values`` of each batch, drawing from torch's global generator.
        views: that many fixed views of each sample in turn, one an epoch, in place of a new draw each time; a batch then
            says in ``view`` which one it holds.
        anew: each batch is drawn from all samples, without one twice; otherwise a pass gives each sample once.
        fields: names of the tensors to fetch; ``None`` takes all. ``index`` always comes along.
        among: positions in the split to stay within; ``index`` still counts in the whole split.
        workers: processes that read a split which is not in memory.
    """

    split: Split
    batch_size: int | None
    shuffle: bool = True
    drop_last: bool = True
    augment: Augment | None = None
    views: int | None = None
    anew: bool = False
    fields: tuple[str, ...] | None = None
    among: Int[Tensor, " part"] | None = None
    workers: int = 0

    @property
    def count(self) -> int:
        """Number of samples that are drawn from."""
        return len(self.split) if self.among is None else len(self.among)

    @property
    def draws(self) -> bool:
        """Whether fetching a batch may use the global generators: an augmentation, or a data set of the user's own."""
        return (self.augment is not None and self.views is None) or not isinstance(self.split.source, Memory)

    def global_size(self, world: int = 1) -> int:
        """Samples per step over all processes."""
        return (self.count if self.batch_size is None else self.batch_size * world) if self.count else 0

    def per_epoch(self, world: int = 1) -> int:
        """Steps per epoch.

        Raises:
            UserError: if the split does not fill one global batch and ``drop_last`` is set, or is empty.
        """
        size = self.global_size(world)
        full, rest = divmod(self.count, size) if size else (0, 0)
        steps = full + (not self.drop_last and rest >= world)
        if not steps:
            raise UserError(
                f"The split {self.split.name!r} holds {self.count} samples, fewer than a global batch of {size};"
                " choose a smaller batch_size (of a teacher that is trained first: teacher.batch_size)."
            )
        return steps

    def open(self, seed: int, *, rank: int = 0, world: int = 1, device: torch.device | str = "cpu") -> Stream:
        """Start an endless stream of this description's batches for one of ``world`` processes."""
        if self.batch_size is None and world > 1:
            raise UserError("batch_size=None (the whole split at once) runs in one process; give a batch_size.")
        return Stream(self, seed, rank=rank, world=world, device=torch.device(device))


class Stream:
    """An endless iterator of batches over epochs; see :class:`Batches`.

    Attributes:
        position: number of batches given so far, over all epochs.
        per_epoch: batches per epoch.
    """

    def __init__(self, batches: Batches, seed: int, *, rank: int, world: int, device: torch.device) -> None:
        self.batches, self.seed, self.rank, self.world, self.device = batches, seed, rank, world, device
        self.split = batches.split
        self.per_epoch = batches.per_epoch(world)
        self.position = 0
        self._order_epoch = -1
        self._order = torch.empty(0, dtype=torch.long)
        self._loader: Iterator[dict[str, Tensor]] | None = None
        self._stored = self.split.on(device, batches.fields)
        self._stored_on = next(iter(self._stored.values())).device if self._stored else device
        self._count, self._global_size = batches.count, batches.global_size(world)

    @property
    def epoch(self) -> int:
        """Epoch that the next batch belongs to, from 0."""
        return self.position // self.per_epoch

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        epoch, step = divmod(self.position, self.per_epoch)
        if self._stored is None:
            stored = self._streamed()
        else:
            if self.batches.anew:
                index = self._drawn(self.position).to(self._stored_on)
            else:
                if epoch != self._order_epoch:
                    self._order = self._permutation(epoch).to(self._stored_on)
                    self._order_epoch = epoch
                index = self._order[self._slice(step)]
            stored = {name: tensor.index_select(0, index) for name, tensor in self._stored.items()}
            stored["index"] = index
        self.position += 1
        view = None if self.batches.views is None else epoch % self.batches.views
        return self.split.prepare(
            stored, device=self.device, augment=self.batches.augment, rank=self.rank, world=self.world, view=view
        )

    def state(self) -> dict[str, int]:
        """Where the stream is, as JSON-ready numbers."""
        return {
            "seed": self.seed,
            "position": self.position,
            "global_size": self.batches.global_size(self.world),
            "count": self.batches.count,
        }

    def restore(self, state: dict[str, int]) -> None:
        """Go on where :meth:`state` was taken; the number of processes may differ, the global batch may not.

        Raises:
            UserError: if the state belongs to another seed, batch size or split.
        """
        own = self.state()
        for name in ("seed", "global_size", "count"):
            if state[name] != own[name]:
                raise UserError(
                    f"A stream over the split {self.split.name!r} cannot be resumed: {name} was {state[name]} and is"
                    f" now {own[name]}."
                )
        self.close()
        self.position = state["position"]

    def close(self) -> None:
        """Stop the reading processes, if any; the stream can go on afterwards."""
        self._loader = None

    def _permutation(self, epoch: int) -> Tensor:
        count, among = self.batches.count, self.batches.among
        if self.batches.shuffle:
            generator = torch.Generator().manual_seed(number_of("order", self.seed, epoch))
            order = torch.randperm(count, generator=generator)
        else:
            order = torch.arange(count)
        return order if among is None else among[order]

    def _drawn(self, position: int) -> Tensor:
        """This process's part of the global batch at a position of the stream, of samples drawn for it alone."""
        generator = torch.Generator().manual_seed(number_of("anew", self.seed, position))
        chosen = torch.randperm(self._count, generator=generator)[self._slice(0)]
        return chosen if self.batches.among is None else self.batches.among[chosen]

    def _slice(self, step: int) -> slice:
        """This process's part of the step-th global batch within the epoch's order."""
        start = step * self._global_size
        size = min(self._global_size, self._count - start)
        return slice(start + size * self.rank // self.world, start + size * (self.rank + 1) // self.world)

    def _streamed(self) -> dict[str, Tensor]:
        if self._loader is None:
            reader = Reader(self.split, self.batches.fields, self.seed)
            workers = self.batches.workers
            self._loader = iter(
                DataLoader(
                    reader,
                    batch_size=None,
                    sampler=Positions(self),
                    num_workers=workers,
                    pin_memory=self.device.type == "cuda",
                    generator=torch.Generator().manual_seed(0),
                )
            )
        return next(self._loader)


class Positions(Sampler[tuple[int, Tensor]]):
    """Yields (epoch, sample positions) of every batch from the stream's position on, without end."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        stream, position, order_epoch = self.stream, self.stream.position, -1
        while True:
            epoch, step = divmod(position, stream.per_epoch)
            if stream.batches.anew:
                # A sample that is drawn again soon is read anew, too.
                yield position, stream._drawn(position)
            else:
                if epoch != order_epoch:
                    order, order_epoch = stream._permutation(epoch), epoch
                yield epoch, order[stream._slice(step)]
            position += 1


class Reader(Dataset[dict[str, Tensor]]):
    """Reads one batch at a time from a split that is not in memory, in whichever process it runs.

    Before each sample the CPU generators are seeded with hash(seed, epoch, sample), and put back afterwards: a data
    set with random transforms gives the same sample for the same place in the stream, in any worker and any process.
    """

    def __init__(self, split: Split, fields: tuple[str, ...] | None, seed: int) -> None:
        self.split, self.fields, self.seed = split, fields, seed

    def __getitem__(self, place: tuple[int, Tensor]) -> dict[str, Tensor]:
        epoch, index = place
        source = self.split.source
        stored = source.fetch(index, seeds=lambda sample: number_of("sample", self.seed, epoch, sample))
        if self.fields is not None:
            stored = {name: stored[name] for name in self.fields}
        stored["index"] = index
        return stored
