"""Selections against brute force over all candidates."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.modules.coresets import herding, k_center, random_selection


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def samples():
    labels = torch.randint(3, (45,), generator=seeded(0))
    return torch.randn(45, 4, dtype=torch.float64, generator=seeded(1)) + 10, labels


def test_herding_is_the_greedy_choice_by_brute_force(samples):
    features, labels = samples
    expected = []
    for label in range(3):
        members = [i for i in range(45) if labels[i] == label]
        mean = features[members].mean(0)
        chosen = []
        for _ in range(7):
            rest = [i for i in members if i not in chosen]
            chosen.append(min(rest, key=lambda i: (features[[*chosen, i]].mean(0) - mean).norm().item()))
        expected += chosen
    assert herding(features, labels, 7).tolist() == expected
    assert herding(features, labels, 3).reshape(3, 3).tolist() == torch.tensor(expected).reshape(3, 7)[:, :3].tolist()


def test_herding_follows_the_mean_closer_than_chance(samples):
    features, labels = samples
    mean = torch.stack([features[labels == k].mean(0) for k in range(3)])

    def distance(chosen):
        return (features[chosen].reshape(3, 5, -1).mean(1) - mean).norm()

    chance = [distance(random_selection(labels, 5, generator=seeded(s))) for s in range(20)]
    assert distance(herding(features, labels, 5)) < min(chance)


@pytest.mark.parametrize("start", ["mean", "random"])
def test_k_center_is_the_greedy_choice_by_brute_force(samples, start):
    features, labels = samples
    chosen = k_center(features, labels, 6, start=start, generator=seeded(3)).reshape(3, 6).tolist()
    for label in range(3):
        members = [i for i in range(45) if labels[i] == label]
        picked = chosen[label][:1]
        if start == "mean":
            mean = features[members].mean(0)
            assert picked[0] == min(members, key=lambda i: (features[i] - mean).norm().item())
        while len(picked) < 6:
            rest = [i for i in members if i not in picked]
            picked.append(max(rest, key=lambda i: min((features[i] - features[j]).norm().item() for j in picked)))
        assert chosen[label] == picked


def test_k_center_covers_within_twice_the_best_radius(samples):
    features, labels = samples
    members = (labels == 0).nonzero().flatten()

    def radius(centres):
        return torch.cdist(features[members], features[centres]).min(1).values.max().item()

    greedy = radius(k_center(features, labels, 3)[:3])
    best = min(radius(list(centres)) for centres in combinations(members.tolist(), 3))
    assert best <= greedy <= 2 * best


def test_random_selection_is_uniform_without_replacement(samples):
    _, labels = samples
    chosen = random_selection(labels, 4, generator=seeded(5))
    assert len(set(chosen.tolist())) == 12
    assert labels[chosen].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(chosen, random_selection(labels, 4, generator=seeded(5)))
    counts = torch.zeros(45)
    for seed in range(2000):
        counts[random_selection(labels, 4, generator=seeded(seed))] += 1
    shares = 4 / torch.bincount(labels)[labels]
    torch.testing.assert_close(counts / 2000, shares, rtol=0, atol=0.05)


@pytest.mark.parametrize("select", [herding, k_center])
def test_translation_and_precision_do_not_matter(samples, select):
    features, labels = samples
    assert torch.equal(select(features, labels, 6), select(features + 100, labels, 6))
    assert torch.equal(select(features, labels, 6), select(features.float(), labels, 6))


def test_whole_classes_and_duplicates():
    labels = torch.tensor([5, 2, 5, 2])
    same = torch.zeros(4, 3)
    for chosen in (herding(same, labels, 2), k_center(same, labels, 2)):
        assert chosen.tolist() == [1, 3, 0, 2], "gaps in the labels are fine and ties go to the lowest position"
    assert sorted(random_selection(labels, 2).tolist()) == [0, 1, 2, 3]


def test_bad_input_is_told_in_a_sentence(samples):
    features, labels = samples
    small = torch.tensor([0, 0, 7])
    with pytest.raises(UserError, match="The class 7 has 1 samples, fewer than the 2 asked for"):
        random_selection(small, 2)
    with pytest.raises(UserError, match="per_class must be at least 1, not 0"):
        herding(features, labels, 0)
    features[8, 1] = torch.nan
    with pytest.raises(UserError, match="features of sample 8 are not finite"):
        k_center(features, labels, 1)
    with pytest.raises(UserError, match="45 labels need as many features, not 3"):
        herding(features[:3], labels, 1)
