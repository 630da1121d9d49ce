"""How well latents separate known sources: InfoMEC, DCI, the mutual information gap and SAP.

Every function takes ``sources`` of shape (samples, sources), labels of the true factors, and ``latents`` of shape
(samples, latents), as arrays or tensors, and needs neither a model nor images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_selection import mutual_info_classif
from sklearn.linear_model import Lasso, LogisticRegression
from sklearn.metrics import log_loss, mutual_info_score
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.parallel import Parallel, delayed
from torch import Tensor

from stillhouse.errors import UserError, nearest

Predictor = Literal["boosted_trees", "random_forest", "lasso"]
ROUNDING = 1e-12  # a plug-in estimate for independent variables is 0 only up to this

Labels = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class InfoMEC:
    """The three scores, each at most 1 and better when higher, and what they were computed from.

    Attributes:
        modularity: InfoM: does each active latent inform about one source only?
        explicitness: InfoE: how much of each source does a linear classifier find in all latents?
        compactness: InfoC: is each source found in one active latent only?
        nmi: mutual information of source s and latent j over the entropy of source s, shape (sources, latents); NaN
            for a source that never changes.
        active: which latents change enough to count, shape (latents,).
    """

    modularity: float
    explicitness: float
    compactness: float
    nmi: Floats
    active: NDArray[np.bool_]


@dataclass(frozen=True)
class DCI:
    """Three scores, each at most 1 and better when higher, and what they were computed from.

    Attributes:
        disentanglement: does each latent matter to one source only?
        completeness: does each source need one latent only?
        informativeness: how well the predictors do on held-out samples, a mean over sources: accuracy of trees; of the
            lasso, 1 minus the root-mean-square error in units of the source's standard deviation.
        importance: importance of latent j to the prediction of source s, shape (latents, sources); NaN for a source
            that never changes.
    """

    disentanglement: float
    completeness: float
    informativeness: float
    importance: Floats


def info_mec(
    sources: ArrayLike | Tensor,
    latents: ArrayLike | Tensor,
    *,
    discrete: bool,
    n_neighbors: int = 10,
    seed: int = 0,
    n_jobs: int | None = None,
) -> InfoMEC:
    """InfoMEC: modularity, explicitness and compactness in the terms of information theory.

    *Disentanglement via Latent Quantization* (arXiv 2305.18378). With NMI_sj = I(source_s; latent_j) / H(source_s) over
    active latents, InfoM and InfoC average the largest entry's share of each column and of each row, rescaled so that
    an even spread scores 0. InfoE is the information about each source that logistic regression (no penalty, balanced
    classes, at most 100 iterations of L-BFGS) finds in all latents, as a share of what it would find in the source.

    InfoM and InfoC are shares of whatever information there is: on continuous codes of pure chance InfoM comes to about 0.6
    at any number of samples, on discrete ones to about 0.1. Read them beside InfoE.

    What comes to 0/0 does not count, and a warning says so: a source that never changes is left out of all three
    scores, an active latent without information out of InfoM, a source without informative latent out of InfoC. A score
    of which nothing is left is NaN, and so are InfoM with one source and InfoC with one active latent.

    Args:
        sources: labels of the true factors, shape (samples, sources).
        latents: codes, shape (samples, latents); of quantised codes the indices or the stored values.
        discrete: whether latents take few values. Mutual information is then the plug-in estimate, all latents that
            change at all are active, and logistic regression sees them one-hot. Otherwise it is Ross's (2014) estimate
            from nearest neighbours (noisy where values repeat), latents of less than a twentieth of the widest range
            are not active, and logistic regression sees them standardised.
        n_neighbors: neighbours of Ross's estimator.
        seed: of the noise (about 1e-10) by which that estimator breaks ties.
        n_jobs: processes to spread the sources over; -1 for all cores.

    Raises:
        UserError: for arrays that are not two-dimensional or of different lengths, non-finite numbers, sources that are
            no labels, ``discrete`` latents with more values than half the samples, or too few samples for neighbours.

    >>> grid = np.stack(np.meshgrid([0, 1, 2], [0, 1, 2]), axis=-1).reshape(-1, 2).repeat(2, axis=0)
    >>> scores = info_mec(grid, grid[:, ::-1], discrete=True)
    >>> round(scores.modularity, 6), round(scores.explicitness, 2), round(scores.compactness, 6)
    (1.0, 1.0, 1.0)
    """
    labels, codes = _read(sources, latents, discrete=discrete)
    ranges = np.ptp(codes, axis=0)
    if discrete:
        active = ranges > 0
        inputs = OneHotEncoder().fit_transform(codes)
    else:
        active = ranges > ranges.max() / 20
        inputs = StandardScaler().fit_transform(codes)
        _check_neighbors(labels, n_neighbors)
    varying = _varying(labels)

    nmi = np.full((labels.shape[1], codes.shape[1]), np.nan)
    columns = _as_labels(codes) if discrete else inputs
    information = _each(_mutual_information, labels, varying, n_jobs, columns, discrete, n_neighbors, seed)
    for source, row in zip(varying, information, strict=True):
        nmi[source] = row / mutual_info_score(labels[:, source], labels[:, source])
    found = _each(_predictable_share, labels, varying, n_jobs, inputs)
    table = nmi[np.ix_(varying, np.flatnonzero(active))]
    return InfoMEC(
        modularity=_concentration(table.T, "InfoM", "active latents", "sources"),
        explicitness=_mean(found),
        compactness=_concentration(table, "InfoC", "sources", "active latents"),
        nmi=nmi,
        active=active,
    )


def dci(
    sources: ArrayLike | Tensor,
    latents: ArrayLike | Tensor,
    *,
    predictor: Predictor = "boosted_trees",
    test_fraction: float = 0.2,
    alpha: float = 0.02,
    seed: int = 0,
    n_jobs: int | None = None,
) -> DCI:
    """Disentanglement, completeness and informativeness from the importance of each latent to each source's predictor.

    *A Framework for the Quantitative Evaluation of Disentangled Representations* (Eastwood & Williams, ICLR 2018): a
    latent's disentanglement is 1 minus the entropy (base: number of sources) of its normalised importances, averaged
    with weights proportional to its total importance; a source's completeness likewise over latents, averaged plainly.
    Importances are a tree ensemble's impurity decreases or the absolute coefficients of a lasso on standardised latents
    and sources, whose labels should then have an order.

    Args:
        sources: labels of the true factors, shape (samples, sources).
        latents: codes, shape (samples, latents).
        predictor: gradient-boosted trees (usual since arXiv 1811.12359; minutes at 10 000 samples), a random
            forest, or a lasso.
        test_fraction: share of the samples kept for informativeness, drawn with ``seed``.
        alpha: penalty of the lasso.
        seed: of the split and of the trees.
        n_jobs: processes to spread the sources over; -1 for all cores.

    Raises:
        UserError: for bad arrays as in :func:`info_mec`, an unknown predictor or an empty split.
    """
    if predictor not in ("boosted_trees", "random_forest", "lasso"):
        raise UserError(f"There is no predictor {predictor!r}; {nearest(predictor, Predictor.__args__)}.")  # type: ignore[attr-defined]
    labels, codes = _read(sources, latents)
    varying = _varying(labels)
    train, test = _split(len(codes), test_fraction, seed)
    importance = np.full((codes.shape[1], labels.shape[1]), np.nan)
    quality = []
    fits = _each(_fit_predictor, labels, varying, n_jobs, codes, train, test, predictor, alpha, seed)
    for source, (weights, held_out) in zip(varying, fits, strict=True):
        importance[:, source] = weights
        quality.append(held_out)
    used = importance[:, varying]
    return DCI(
        # A latent that no predictor uses has weight 0.
        disentanglement=_order(used[used.any(axis=1)], "disentanglement", "used latents", "sources", weighted=True),
        completeness=_order(used.T, "completeness", "sources", "latents", weighted=False),
        informativeness=_mean(quality),
        importance=importance,
    )


def mig(sources: ArrayLike | Tensor, latents: ArrayLike | Tensor, *, discrete: bool, bins: int = 20) -> float:
    """Mutual information gap: for each source, how much more its best latent tells than the second best.

    *Isolating Sources of Disentanglement in VAEs* (arXiv 1802.04942) with the plug-in estimate: the mean
    over sources of the gap over the source's entropy. NaN, with a warning, for fewer than two latents.

    Args:
        sources: labels of the true factors, shape (samples, sources).
        latents: codes, shape (samples, latents).
        discrete: whether latents take few values; otherwise each is cut into ``bins`` bins of equal width.
        bins: bins of a continuous latent.

    >>> grid = np.stack(np.meshgrid([0, 1], [0, 1]), axis=-1).reshape(-1, 2).repeat(2, axis=0)
    >>> round(mig(grid, grid, discrete=True), 6)
    1.0
    """
    labels, codes = _read(sources, latents, discrete=discrete)
    binned = _as_labels(codes) if discrete else np.stack([_equal_width(column, bins) for column in codes.T], axis=1)
    gaps = []
    for source in _varying(labels):
        label = labels[:, source]
        gaps.append(_gap(_mutual_information(label, binned, True, 0, 0)) / mutual_info_score(label, label))
    return _defined_mean(gaps, "MIG")


def sap(
    sources: ArrayLike | Tensor, latents: ArrayLike | Tensor, *, test_fraction: float = 0.2, seed: int = 0
) -> float:
    """Separated attribute predictability: for each source, how much better its best latent predicts it than the next.

    *Variational Inference of Disentangled Latent Concepts from Unlabeled Observations* (arXiv 1711.00848), section 3,
    for categorical sources: the held-out accuracy of a linear support-vector classifier (C = 0.01, balanced classes) on
    one latent at a time, 0 for a latent that never changes. The penalty makes it depend on the latents' scale. NaN,
    with a warning, for fewer than two latents.

    Args:
        sources: labels of the true factors, shape (samples, sources).
        latents: codes, shape (samples, latents).
        test_fraction: share of the samples that accuracy is measured on, drawn with ``seed``.
        seed: of the split.
    """
    labels, codes = _read(sources, latents)
    train, test = _split(len(codes), test_fraction, seed)
    gaps = []
    for source in _varying(labels):
        label = labels[:, source]
        scores = np.zeros(codes.shape[1])
        for latent in np.flatnonzero(np.std(codes, axis=0) > 1e-12):
            column = codes[:, [latent]]
            classifier = LinearSVC(C=0.01, class_weight="balanced", dual=False).fit(column[train], label[train])
            scores[latent] = classifier.score(column[test], label[test])
        gaps.append(_gap(scores))
    return _defined_mean(gaps, "SAP")


def _mutual_information(label: Labels, codes: Any, discrete: bool, n_neighbors: int, seed: int) -> Floats:
    """Mutual information of one source with every latent, in nats."""
    if discrete:
        return np.array([mutual_info_score(label, column) for column in codes.T])
    information = mutual_info_classif(codes, label, discrete_features=False, n_neighbors=n_neighbors, random_state=seed)
    return np.where(np.ptp(codes, axis=0) > 0, information, 0.0)


def _predictable_share(label: Labels, inputs: Any) -> float:
    """(H - H_hat) / H for one source: log-loss of logistic regression against that of the same fit on nothing.

    On inputs that say nothing, balanced classes make the fit uniform, so its log-loss is log(number of classes)
    whatever the classes' frequencies.
    """
    null = np.log(label.max() + 1)
    # The published scores come from a scikit-learn that put its tolerance on the sum over samples, today's on the mean.
    model = LogisticRegression(C=np.inf, class_weight="balanced", max_iter=100, tol=1e-4 / len(label))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(inputs, label)
    return float((null - log_loss(label, model.predict_proba(inputs))) / null)


def _fit_predictor(
    label: Labels,
    codes: Floats,
    train: Labels,
    test: Labels,
    predictor: Predictor,
    alpha: float,
    seed: int,
) -> tuple[Floats, float]:
    """Importance of each latent to one source, and how well the source is predicted on held-out samples."""
    if predictor == "lasso":
        scale = StandardScaler().fit(codes[train])
        target = (label - label[train].mean()) / label[train].std()
        lasso = Lasso(alpha=alpha).fit(scale.transform(codes[train]), target[train])
        error = target[test] - lasso.predict(scale.transform(codes[test]))
        return np.abs(lasso.coef_), float(1 - np.sqrt(np.mean(error**2)))
    make = GradientBoostingClassifier if predictor == "boosted_trees" else RandomForestClassifier
    # Every split chooses among all latents: a drawn subset would have to use latents that say nothing.
    trees = make(max_features=None, random_state=seed).fit(codes[train], label[train])
    return np.abs(trees.feature_importances_), float(trees.score(codes[test], label[test]))


def _concentration(table: Floats, score: str, items: str, alternatives: str) -> float:
    """Mean share of the largest entry in each row (an item), rescaled to 0 for an even spread over the alternatives."""
    table = _informative(table, score, items, alternatives)
    if not table.size:
        return float("nan")
    count = table.shape[1]
    share = np.mean(table.max(axis=1) / table.sum(axis=1))
    return float((share - 1 / count) / (1 - 1 / count))


def _order(table: Floats, score: str, items: str, alternatives: str, *, weighted: bool) -> float:
    """Mean of 1 minus the entropy of each row (an item) over the alternatives, in units of the largest possible."""
    table = _informative(table, score, items, alternatives)
    if not table.size:
        return float("nan")
    totals = table.sum(axis=1)
    parts = table / totals[:, None]
    logs = np.log(parts, where=parts > 0, out=np.zeros_like(parts))
    order = 1 + np.sum(parts * logs, axis=1) / np.log(table.shape[1])
    return float(np.average(order, weights=totals if weighted else None))


def _informative(table: Floats, score: str, items: str, alternatives: str) -> Floats:
    """The rows that are not all zero up to rounding, none where the score is undefined; says so in a warning."""
    if table.shape[1] < 2:
        _warn(f"{score} is undefined with {table.shape[1]} {alternatives}: it needs at least 2.", depth=5)
        return table[:0]
    rows = table.max(axis=1) > ROUNDING
    if not rows.any():
        _warn(f"{score} is undefined: none of the {len(rows)} {items} is informative.", depth=5)
    elif not rows.all():
        _warn(f"{score} leaves out {np.sum(~rows)} of {len(rows)} {items} without information.", depth=5)
    informative: Floats = table[rows]
    return informative


def _gap(scores: Floats) -> float:
    """The largest score minus the second largest; NaN for a single one."""
    if len(scores) < 2:
        return float("nan")
    second, first = np.sort(scores)[-2:]
    return float(first - second)


def _defined_mean(gaps: list[float], score: str) -> float:
    value = _mean(gaps)
    if np.isnan(value) and gaps:
        _warn(f"{score} is undefined with 1 latent: it needs at least 2.")
    return value


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(np.mean(values)) if values else float("nan")


def _each(function: Callable[..., Any], labels: Labels, varying: Labels, n_jobs: int | None, *args: Any) -> list[Any]:
    """``function(label, *args)`` for every source that varies."""
    found: list[Any] = Parallel(n_jobs=n_jobs)(delayed(function)(labels[:, source], *args) for source in varying)
    return found


def _varying(labels: Labels) -> Labels:
    """Positions of the sources that take more than one value."""
    changes = labels.max(axis=0) > 0
    if not changes.all():
        which = ", ".join(str(source) for source in np.flatnonzero(~changes))
        _warn(f"Sources that never change are left out: {which}.")
    return np.flatnonzero(changes)


def _split(num_samples: int, test_fraction: float, seed: int) -> tuple[Labels, Labels]:
    num_test = round(num_samples * test_fraction)
    if not 0 < num_test < num_samples:
        raise UserError(
            f"A test_fraction of {test_fraction} leaves no split of {num_samples} samples; give one in (0, 1)."
        )
    order = np.random.default_rng(seed).permutation(num_samples)
    return order[num_test:], order[:num_test]


def _equal_width(column: Floats, bins: int) -> Labels:
    edges = np.linspace(column.min(), column.max(), bins + 1)
    return np.digitize(column, edges[1:-1])


def _as_labels(columns: NDArray[Any]) -> Labels:
    """Each column's values as 0, 1, ... in ascending order."""
    return np.stack([np.unique(column, return_inverse=True)[1] for column in columns.T], axis=1)


def _read(sources: ArrayLike | Tensor, latents: ArrayLike | Tensor, *, discrete: bool = False) -> tuple[Labels, Floats]:
    """Sources as labels from 0 and latents as float64, or one sentence about what is wrong with them."""
    truth, codes = _array(sources), _array(latents)
    for name, array in (("sources", truth), ("latents", codes)):
        if array.ndim != 2 or not array.size:
            raise UserError(f"The {name} have shape {array.shape}; give one row per sample and one column each.")
        if not np.isfinite(array).all():
            raise UserError(f"The {name} contain NaN or infinite numbers; every sample needs finite ones.")
    if len(truth) != len(codes):
        raise UserError(f"There are {len(truth)} samples of sources but {len(codes)} of latents; give one row each.")
    whole = np.issubdtype(truth.dtype, np.integer) or truth.dtype == np.bool_
    if not whole and (column := _continuous(truth)) is not None:
        raise UserError(
            f"Source {column} has a new value in more than half of its samples; sources are labels: cut it into bins."
        )
    codes = codes.astype(np.float64)
    if discrete and (column := _continuous(codes)) is not None:
        raise UserError(
            f"Latent {column} has a new value in more than half of its samples; it is continuous: pass discrete=False."
        )
    return _as_labels(truth), codes


def _array(values: ArrayLike | Tensor) -> NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
    return np.asarray(values)


def _continuous(columns: NDArray[Any]) -> int | None:
    """The first column with more distinct values than half its rows."""
    return next((j for j, column in enumerate(columns.T) if 2 * len(np.unique(column)) > len(column)), None)


def _check_neighbors(labels: Labels, n_neighbors: int) -> None:
    for source, label in enumerate(labels.T):
        most = np.bincount(label).max()
        if most <= n_neighbors:
            raise UserError(
                f"No label of source {source} has more than {most} samples, too few for {n_neighbors} neighbours; "
                f"give more samples or a smaller n_neighbors."
            )


def _warn(message: str, *, depth: int = 4) -> None:
    """Warn at the line that called the public function, ``depth`` frames up."""
    warnings.warn(message, UserWarning, stacklevel=depth)
