"""Choosing real images: the lines that a distilled set must be compared with."""

from __future__ import annotations

from typing import ClassVar, Literal

from stillhouse.engine import Paper
from stillhouse.methods.datasets.condensation import Selection, Start


class RandomSelection(Selection):
    """Random real images of each class."""

    name: ClassVar[str] = "random-selection"
    family: ClassVar[str] = "datasets"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper("Random selection", 2021, venue="baseline of the dataset condensation literature")
    summary: ClassVar[str] = "a tiny training set of random real images: the line to beat"

    how: ClassVar[Start] = "random"


class Herding(Selection):
    """Real images whose running mean of features follows the class mean (Welling 2009)."""

    name: ClassVar[str] = "herding"
    family: ClassVar[str] = "datasets"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper("Herding dynamical weights to learn", 2009, venue="ICML 2009")
    summary: ClassVar[str] = (
        "a tiny training set of real images that follow the class means in a trained network's features"
    )
    verified: ClassVar[Literal["official", "reference", "formula"]] = "reference"

    how: ClassVar[Start] = "herding"


class KCenter(Selection):
    """Real images that cover each class: greedily the one farthest from all chosen (Sener and Savarese 2018)."""

    name: ClassVar[str] = "k-center"
    family: ClassVar[str] = "datasets"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Active Learning for Convolutional Neural Networks: A Core-Set Approach", 2018, arxiv="1708.00489"
    )
    summary: ClassVar[str] = "a tiny training set of real images that cover each class in a trained network's features"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "reference"

    how: ClassVar[Start] = "k-center"
