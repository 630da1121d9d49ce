import json
import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from stillhouse.data import Data, load_data
from stillhouse.errors import UserError


class Noisy(Dataset):
    """Items that depend on all three global generators, as with random transforms."""

    def __len__(self):
        return 40

    def __getitem__(self, position):
        noise = torch.rand(1).item() + random.random() + np.random.rand()
        return {"features": torch.tensor([float(position), noise]), "labels": position % 4}


def in_memory() -> Data:
    x = torch.arange(50.0)[:, None].repeat(1, 2)
    return load_data({"kind": "object", "object": (x, torch.arange(50) % 5), "validation": 0, "test": 0})


def streamed() -> Data:
    return load_data({"kind": "object", "object": Noisy(), "validation": 0, "test": 0})


@pytest.fixture(params=["memory", "streamed"])
def split(request):
    data = in_memory() if request.param == "memory" else streamed()
    assert (data.split("train").tensors is None) == (request.param == "streamed")
    return data.split("train")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("shuffle", [True, False])
def test_two_processes_see_what_one_with_the_doubled_batch_sees(split, shuffle):
    whole = split.batches(8, shuffle=shuffle).open(3)
    parts = [split.batches(4, shuffle=shuffle).open(3, rank=rank, world=2) for rank in range(2)]
    for _ in range(15):
        batch, halves = next(whole), [next(part) for part in parts]
        assert same(batch, {name: torch.cat([half[name] for half in halves]) for name in batch})


@pytest.mark.parametrize("position", [0, 1, 4, 9, 23])
def test_a_stream_resumes_exactly_anywhere(split, position):
    straight = split.batches(8).open(11)
    for _ in range(position):
        next(straight)
    state = json.loads(json.dumps(straight.state()))
    resumed = split.batches(8).open(11)
    next(resumed)
    resumed.restore(state)
    assert (resumed.position, resumed.epoch) == (straight.position, straight.epoch)
    for _ in range(7):
        assert same(next(straight), next(resumed))


def test_workers_change_nothing_and_resume_exactly():
    split = streamed().split("train")
    alone, helped = split.batches(8).open(5), split.batches(8, workers=2).open(5)
    batches = [next(alone) for _ in range(9)]
    for batch in batches[:4]:
        assert same(batch, next(helped))
    state = helped.state()
    helped.close()
    resumed = split.batches(8, workers=2).open(5)
    resumed.restore(state)
    for batch in batches[4:]:
        assert same(batch, next(resumed))
    resumed.close()


def test_reading_leaves_the_global_generators_alone():
    split = streamed().split("train")
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    expected = (torch.rand(1).item(), random.random(), np.random.rand())
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    next(split.batches(4).open(0))
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


def test_an_epoch_holds_every_sample_once_and_epochs_differ(split):
    batches = split.batches(10 if len(split) == 50 else 8)
    stream = batches.open(0)
    epochs = [torch.cat([next(stream).index for _ in range(batches.per_epoch())]) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(len(split)))
    assert not torch.equal(*epochs)
    assert not torch.equal(next(batches.open(1)).index, epochs[0][: batches.batch_size])


def test_the_last_batch(split):
    count = len(split)
    assert split.batches(16).per_epoch() == count // 16
    kept = split.batches(16, drop_last=False)
    assert kept.per_epoch() == -(-count // 16)
    stream = kept.open(0)
    assert sum(next(stream).size for _ in range(kept.per_epoch())) == count
    assert next(stream).size == 16
    parts = [split.batches(8, drop_last=False).open(0, rank=rank, world=2) for rank in range(2)]
    sizes = [[next(part).size for _ in range(kept.per_epoch())] for part in parts]
    assert sum(map(sum, sizes)) == count
    assert abs(sizes[0][-1] - sizes[1][-1]) <= 1


def test_a_split_smaller_than_the_global_batch_is_refused():
    split = in_memory().split("train")
    assert split.batches(30).per_epoch() == 1
    with pytest.raises(UserError, match="holds 50 samples, fewer than a global batch of 60"):
        split.batches(30).open(0, world=2)
    assert next(split.batches(60, drop_last=False).open(0)).size == 50
    with pytest.raises(UserError, match="at least 1"):
        split.batches(0)


def test_the_whole_split_as_one_batch():
    split = in_memory().split("train")
    stream = split.batches(None).open(0)
    assert stream.per_epoch == 1
    assert sorted(next(stream).index.tolist()) == list(range(50))


def test_staying_among_some_samples(split):
    among = torch.tensor([7, 3, 20, 11, 9])
    stream = split.batches(5, among=among).open(0)
    batch = next(stream)
    assert sorted(batch.index.tolist()) == [3, 7, 9, 11, 20]
    assert torch.equal(batch["features"][:, 0].long(), batch.index)
    mask = torch.zeros(len(split), dtype=torch.bool)
    mask[among] = True
    assert sorted(next(split.batches(5, among=mask).open(0)).index.tolist()) == [3, 7, 9, 11, 20]


def test_only_some_fields(split):
    assert set(next(split.batches(5, fields=["labels"]).open(0))) == {"labels", "index"}


def test_an_unknown_field_is_named():
    with pytest.raises(UserError, match="no field 'lables'; did you mean 'labels'"):
        in_memory().split("train").batches(5, fields=["lables"])


def test_a_state_of_another_stream_is_refused():
    split = in_memory().split("train")
    state = split.batches(8).open(0).state()
    with pytest.raises(UserError, match="seed was 0 and is now 1"):
        split.batches(8).open(1).restore(state)
    with pytest.raises(UserError, match="global_size was 8 and is now 16"):
        split.batches(8).open(0, world=2).restore(state)
    split.batches(4).open(0, world=2).restore(state)


def test_in_order_batch_take_subset_and_classes(split):
    batches = list(split.in_order(16))
    assert torch.equal(torch.cat([batch.index for batch in batches]), torch.arange(len(split)))
    picked = split.batch([4, 2])
    assert picked["features"][:, 0].tolist() == [4, 2]
    assert picked.index.tolist() == [4, 2]
    taken = split.take(8)
    counts = torch.bincount(torch.cat([batch.labels for batch in taken.in_order(8)]), minlength=split.facts.num_classes)
    assert counts.max() - counts.min() <= 1
    sub = split.subset(torch.tensor([5, 1]))
    assert sub.batch([0, 1])["features"][:, 0].tolist() == [5, 1]
    by_class = split.by_class()
    assert list(by_class) == list(range(split.facts.num_classes))
    assert all((split.batch(index).labels == label).all() for label, index in by_class.items())
    with pytest.raises(UserError, match="Cannot take 1000"):
        split.take(1000)


def test_the_split_as_a_map_style_data_set(split):
    dataset = split.dataset
    assert len(dataset) == len(split)
    assert dataset[3]["labels"] == split.batch([3]).labels[0]
    with pytest.raises(IndexError):
        dataset[len(split)]


def test_a_missing_split_is_named():
    with pytest.raises(UserError, match="has no split 'test'; it has 'train'"):
        in_memory().split("test")


def test_batches_drawn_anew(split):
    """Each without a sample twice, and independent of the others: no pass gives each sample once. Resumes by its position."""
    stream = split.batches(8, anew=True).open(3)
    drawn = [next(stream).index for _ in range(stream.per_epoch)]
    assert all(len(index.unique()) == 8 for index in drawn)
    assert len(torch.cat(drawn).unique()) < 8 * stream.per_epoch
    after = next(stream)
    resumed = split.batches(8, anew=True).open(3)
    resumed.restore(json.loads(json.dumps({**stream.state(), "position": stream.per_epoch})))
    assert same(next(resumed), after)
    halves = [split.batches(4, anew=True).open(3, rank=rank, world=2) for rank in range(2)]
    assert torch.equal(torch.cat([next(half).index for half in halves]), drawn[0])
    few = split.batches(4, anew=True, among=torch.tensor([3, 5, 8, 13, 21])).open(0)
    assert all(set(next(few).index.tolist()) <= {3, 5, 8, 13, 21} for _ in range(5))
