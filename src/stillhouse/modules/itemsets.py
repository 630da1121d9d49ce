"""Sets of items that often occur together: FP-Growth (Han et al. 2000)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from stillhouse.errors import UserError


class TooManyItemsets(UserError):
    """More sets are frequent than were asked for at most."""


class _Node:
    __slots__ = ("children", "count", "item", "parent")

    def __init__(self, item: int, parent: _Node | None) -> None:
        self.item, self.parent, self.count = item, parent, 0
        self.children: dict[int, _Node] = {}


class _Prefixes:
    """An FP-tree: transactions as paths from a root, frequent items first, so that common parts are shared.

    Args:
        transactions: items and how often each transaction occurs.
        support: items that occur less often are left out.
    """

    def __init__(self, transactions: Sequence[tuple[Sequence[int], int]], support: int) -> None:
        counts: Counter[int] = Counter()
        for items, times in transactions:
            for item in items:
                counts[item] += times
        self.supports = {item: count for item, count in counts.items() if count >= support}
        self.ranked = sorted(self.supports, key=lambda item: (-self.supports[item], item))
        rank = {item: place for place, item in enumerate(self.ranked)}
        self.header: dict[int, list[_Node]] = {item: [] for item in self.ranked}
        root = _Node(-1, None)
        for items, times in transactions:
            node = root
            for item in sorted((item for item in items if item in rank), key=rank.__getitem__):
                child = node.children.get(item)
                if child is None:
                    child = node.children[item] = _Node(item, node)
                    self.header[item].append(child)
                child.count += times
                node = child

    def above(self, item: int) -> list[tuple[Sequence[int], int]]:
        """The conditional transactions of an item: what lies above its nodes, as often as these occur."""
        found: list[tuple[Sequence[int], int]] = []
        for node in self.header[item]:
            path, parent = [], node.parent
            while parent is not None and parent.parent is not None:
                path.append(parent.item)
                parent = parent.parent
            if path:
                found.append((path, node.count))
        return found


def frequent_itemsets(
    transactions: Sequence[Iterable[int]], support: int, *, max_size: int | None = None, limit: int | None = None
) -> dict[tuple[int, ...], int]:
    """All sets of items that are part of at least ``support`` transactions, with the number of these.

    Args:
        transactions: items of each; doubled ones count once.
        support: least number of transactions, at least 1.
        max_size: most items of a set; any number by default.
        limit: most sets; their number may be 2 to the power of the number of items.

    Returns:
        Sets as ascending tuples, most frequent first, then small ones first, then in ascending order.

    Raises:
        UserError: ``support`` is below 1.
        TooManyItemsets: there are more than ``limit``.

    >>> frequent_itemsets([{1, 2, 3}, {1, 2}, {1, 3}, {2}], support=2)
    {(1,): 3, (2,): 3, (3,): 2, (1, 2): 2, (1, 3): 2}
    """
    if support < 1:
        raise UserError(
            f"A set of items must occur at least once to be frequent, so the support must be above 0, not {support}."
        )
    found: dict[tuple[int, ...], int] = {}

    def mine(prefixes: _Prefixes, suffix: tuple[int, ...]) -> None:
        for item in reversed(prefixes.ranked):
            itemset = (*suffix, item)
            found[tuple(sorted(itemset))] = prefixes.supports[item]
            if limit is not None and len(found) > limit:
                raise TooManyItemsets(
                    f"More than {limit} sets occur together at least {support} times; raise the threshold, or the most sets."
                )
            if max_size is None or len(itemset) < max_size:
                mine(_Prefixes(prefixes.above(item), support), itemset)

    mine(_Prefixes([(sorted(set(items)), 1) for items in transactions], support), ())
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], len(pair[0]), pair[0])))
