"""The surest samples of each class, from a stream, equal to sorting everything."""

import doctest

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.modules import mining
from stillhouse.modules.mining import TopPerClass, confidence


def sorted_away(predicted, score, k):
    kept = []
    for label in predicted.unique().tolist():
        mine = (predicted == label).nonzero().flatten().tolist()
        kept += sorted(mine, key=lambda i: (-score[i].item(), i))[:k]
    return sorted(kept)


@pytest.mark.parametrize("buffer", [0, 7, 65536])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_it_is_what_sorting_all_scores_gives(buffer, k):
    torch.manual_seed(k)
    logits = (3 * torch.randn(400, 6)).round()  # rounded: many ties
    logits[:, 5] -= 100  # a class that nobody is
    predicted, score = confidence(logits)
    top = TopPerClass(6, k, buffer=buffer)
    order = torch.randperm(400)
    for part in order.split(37):
        top.add(part, predicted[part], score[part])
    picked = top.picked()
    assert picked.index.tolist() == sorted_away(predicted, score, k)
    assert torch.equal(picked.predicted, predicted[picked.index])
    assert torch.equal(picked.score, score[picked.index].double())
    assert top.predicted.tolist() == torch.bincount(predicted, minlength=6).tolist()
    assert torch.bincount(picked.predicted, minlength=6).max() <= k
    for label in range(5):
        kept = picked.score[picked.predicted == label]
        mine = torch.ones(400, dtype=torch.bool)
        mine[picked.index] = False
        dropped = score[mine & (predicted == label)]
        assert not len(dropped) or dropped.max() <= kept.min()


def test_memory_stays_bounded():
    top = TopPerClass(4, 10, buffer=100)
    for start in range(0, 20000, 50):
        index = torch.arange(start, start + 50)
        top.add(index, index % 4, torch.rand(50))
        assert top._held <= 4 * 10 + 100 + 50


def test_shares_of_a_pool_merge_into_the_choice_of_the_whole():
    torch.manual_seed(0)
    index, predicted, score = torch.arange(300), torch.randint(5, (300,)), torch.rand(300)
    whole = TopPerClass(5, 7)
    whole.add(index, predicted, score)
    shares = [TopPerClass(5, 7, buffer=3) for _ in range(3)]
    for rank, share in enumerate(shares):
        share.add(index[rank::3], predicted[rank::3], score[rank::3])
    first, *others = shares
    for share in others:
        first.merge(share)
    assert torch.equal(first.picked().index, whole.picked().index)
    assert torch.equal(first.predicted, whole.predicted)


def test_scores_are_log_probabilities_and_do_not_saturate():
    logits = torch.randn(50, 7)
    predicted, score = confidence(logits)
    assert torch.equal(predicted, logits.argmax(1))
    torch.testing.assert_close(score, logits.double().log_softmax(1).max(1).values)
    # In float32 both have the probability 1.
    sure = torch.tensor([[30.0, 0.0], [31.0, 0.0]])
    assert (sure.softmax(1)[:, 0] == 1).all()
    _, score = confidence(sure)
    assert score[0] < score[1] < 0


def test_bad_input_and_nothing_seen():
    with pytest.raises(UserError, match="at least 1, not 0"):
        TopPerClass(3, 0)
    assert len(TopPerClass(3, 1).picked().index) == 0


def test_the_examples_run():
    assert doctest.testmod(mining, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
