"""FP-Growth equals counting every set."""

from itertools import combinations

import numpy as np
import pytest

from stillhouse.errors import UserError
from stillhouse.modules.itemsets import TooManyItemsets, frequent_itemsets


def transactions(seed, items=12, count=200):
    random = np.random.default_rng(seed)
    chances = random.uniform(0.05, 0.7, items)
    return [set(np.flatnonzero(random.random(items) < chances).tolist()) for _ in range(count)]


def counted(rows, support, items=12):
    found = {}
    for size in range(1, items + 1):
        for itemset in combinations(range(items), size):
            count = sum(set(itemset) <= row for row in rows)
            if count >= support:
                found[itemset] = count
    return found


@pytest.mark.parametrize("support", [1, 5, 20, 60])
@pytest.mark.parametrize("seed", range(3))
def test_it_finds_what_counting_every_set_finds(seed, support):
    rows = transactions(seed)
    found = frequent_itemsets(rows, support)
    assert found == counted(rows, support)
    assert all(found[part] >= count for s, count in found.items() for part in combinations(s, len(s) - 1) if part)
    order = np.random.default_rng(seed).permutation(len(rows))
    assert list(frequent_itemsets([rows[place] for place in order], support)) == list(found), "in one order too"


def test_sizes_and_numbers_can_be_limited():
    rows = transactions(0)
    assert frequent_itemsets(rows, 5, max_size=2) == {s: c for s, c in counted(rows, 5).items() if len(s) <= 2}
    whole = len(frequent_itemsets(rows, 5))
    assert len(frequent_itemsets(rows, 5, limit=whole)) == whole
    with pytest.raises(TooManyItemsets, match=f"More than {whole - 1} sets occur together at least 5 times"):
        frequent_itemsets(rows, 5, limit=whole - 1)


def test_what_nothing_reaches_is_empty_and_a_support_below_one_is_refused():
    assert frequent_itemsets(transactions(0), 201) == {}
    assert frequent_itemsets([], 1) == {}
    with pytest.raises(UserError, match="must be above 0, not 0"):
        frequent_itemsets([{1}], 0)
