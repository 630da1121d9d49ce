"""The bench: methods compared on equal terms, and recipes searched for, by workers that may die."""

from stillhouse.bench.comparison import Comparison, compare
from stillhouse.bench.evaluating import evaluate_dataset
from stillhouse.bench.searching import Search, search
from stillhouse.bench.watching import Unwatched, Watcher

__all__ = ["Comparison", "Search", "Unwatched", "Watcher", "compare", "evaluate_dataset", "search"]
