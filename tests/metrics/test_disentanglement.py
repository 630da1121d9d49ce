"""Disentanglement metrics on codes whose scores are known, against scikit-learn, and on bad input."""

import itertools
import math
import warnings

import joblib
import numpy as np
import pytest
import torch
from scipy.special import xlogy
from sklearn.feature_selection import mutual_info_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, mutual_info_score
from sklearn.preprocessing import StandardScaler

from stillhouse.errors import UserError
from stillhouse.metrics.disentanglement import dci, info_mec, mig, sap


def grid(*sizes, repeat=1):
    """All combinations of independent uniform sources: mutual information between any two is exactly 0."""
    return np.array(list(itertools.product(*map(range, sizes)))).repeat(repeat, axis=0)


@pytest.fixture
def sources():
    return grid(4, 3, 5, repeat=4)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _no_warning_unless_asked():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_permuted_relabelled_copy_scores_one(sources):
    latents = np.stack([sources[:, 2] * 0.37 - 5, (sources[:, 0] * 3) % 4, -sources[:, 1]], axis=1)
    scores = info_mec(sources, latents, discrete=True)
    assert scores.modularity == pytest.approx(1, abs=1e-9)
    assert scores.compactness == pytest.approx(1, abs=1e-9)
    assert scores.explicitness == pytest.approx(1, abs=1e-2)
    assert scores.nmi == pytest.approx(np.eye(3)[:, [2, 0, 1]], abs=1e-9)
    assert scores.active.all()


def test_continuous_copies_score_high_and_a_rotation_lowers_modularity(rng):
    sources = grid(4, 4, 4, repeat=8)
    copies = (sources - 1.5) + 0.1 * rng.standard_normal(sources.shape)
    rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    straight, rotated = info_mec(sources, copies, discrete=False), info_mec(sources, copies @ rotation, discrete=False)
    assert straight.modularity > 0.95
    assert straight.compactness > 0.95
    assert rotated.modularity < 0.5
    assert rotated.compactness < 0.5
    # A linear classifier undoes a rotation.
    assert rotated.explicitness == pytest.approx(straight.explicitness, abs=0.02)


def test_rotated_one_hot_sources_lose_modularity(rng):
    sources = grid(3, 3, repeat=30)
    one_hot = np.concatenate([np.eye(3)[sources[:, 0]], np.eye(3)[sources[:, 1]]], axis=1)
    one_hot += 0.05 * rng.standard_normal(one_hot.shape)
    rotation, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    straight = info_mec(sources, one_hot, discrete=False)
    rotated = info_mec(sources, one_hot @ rotation, discrete=False)
    assert straight.modularity > rotated.modularity + 0.3


@pytest.mark.parametrize(("num_sources", "expected"), [(2, 0.0), (4, 1 / 3)])
def test_pair_codes_share_their_information_equally(num_sources, expected):
    sources = grid(*[3] * num_sources, repeat=10)
    pairs = np.stack([3 * sources[:, i] + sources[:, i ^ 1] for i in range(num_sources)], axis=1)
    scores = info_mec(sources, pairs, discrete=True)
    ratio = scores.nmi.max(axis=0) / scores.nmi.sum(axis=0)
    assert ratio == pytest.approx(0.5, abs=1e-9)
    assert scores.modularity == pytest.approx(expected, abs=1e-9)
    assert scores.explicitness == pytest.approx(1, abs=1e-2)


def test_duplicated_latent_keeps_modularity_and_lowers_compactness(sources):
    scores = info_mec(sources, sources[:, [0, 1, 2, 2]], discrete=True)
    assert scores.modularity == pytest.approx(1, abs=1e-9)
    assert scores.compactness == pytest.approx(((1 + 1 + 1 / 2) / 3 - 1 / 4) / (1 - 1 / 4), abs=1e-9)


def test_constant_latents_are_pruned(sources):
    constant = np.full((len(sources), 2), 7)
    with_constants = info_mec(sources, np.concatenate([constant, sources], axis=1), discrete=True)
    without = info_mec(sources, sources, discrete=True)
    assert with_constants.active.tolist() == [False, False, True, True, True]
    assert with_constants.modularity == pytest.approx(without.modularity)
    assert with_constants.compactness == pytest.approx(without.compactness)
    assert with_constants.explicitness == pytest.approx(without.explicitness, abs=1e-6)
    assert (with_constants.nmi[:, :2] == 0).all()


def test_narrow_continuous_latents_are_pruned(sources, rng):
    noise = rng.uniform(-0.5, 0.5, (len(sources), 1))
    wide = sources + 0.05 * rng.standard_normal(sources.shape)
    span = np.ptp(wide, axis=0).max()
    latents = np.concatenate([wide, noise * span / 21, noise * span / 19, np.ones_like(noise)], axis=1)
    assert info_mec(sources, latents, discrete=False).active.tolist() == [True] * 3 + [False, True, False]


def test_mutual_information_equals_scikit_learn(sources, rng):
    coarse = rng.integers(0, 4, (len(sources), 2)) * (sources[:, :1] > 1)
    nmi = info_mec(sources, coarse, discrete=True).nmi
    for s, j in np.ndindex(3, 2):
        entropy = mutual_info_score(sources[:, s], sources[:, s])
        assert nmi[s, j] == pytest.approx(mutual_info_score(sources[:, s], coarse[:, j]) / entropy, abs=1e-12)
    fine = sources[:, :2] + rng.standard_normal((len(sources), 2))
    nmi = info_mec(sources, fine, discrete=False).nmi
    scaled = StandardScaler().fit_transform(fine)
    for s in range(3):
        expected = mutual_info_classif(scaled, sources[:, s], discrete_features=False, n_neighbors=10, random_state=0)
        assert nmi[s] == pytest.approx(expected / math.log([4, 3, 5][s]), abs=1e-12)


def test_null_model_of_explicitness_is_the_log_of_the_number_of_classes(rng):
    """What the published definition fits on all-zero inputs, for classes of any frequency."""
    labels = rng.choice(5, 400, p=[0.6, 0.2, 0.1, 0.06, 0.04])
    zeros = np.zeros((400, 3))
    null = LogisticRegression(C=np.inf, class_weight="balanced", max_iter=100).fit(zeros, labels)
    assert log_loss(labels, null.predict_proba(zeros)) == pytest.approx(math.log(5), abs=1e-12)


def test_explicitness_is_the_share_of_information_a_linear_classifier_finds(sources, rng):
    half_hidden = np.stack([sources[:, 0], rng.permutation(sources[:, 1])], axis=1)
    scores = info_mec(sources[:, :2], half_hidden, discrete=True)
    assert scores.explicitness == pytest.approx(0.5, abs=0.03)
    noise = rng.integers(0, 4, (len(sources), 3))
    assert abs(info_mec(sources, noise, discrete=True).explicitness) < 0.05


def test_explicitness_sees_exclusive_or_in_no_single_latent():
    sources = grid(2, 2, repeat=50)
    mixed = np.stack([sources[:, 0] ^ sources[:, 1], sources[:, 1]], axis=1)
    with (
        pytest.warns(UserWarning, match="InfoM leaves out 1 of 2 active latents"),
        pytest.warns(UserWarning, match="InfoC leaves out 1 of 2 sources"),
    ):
        scores = info_mec(sources, mixed, discrete=True)
    assert scores.explicitness == pytest.approx(0.5, abs=1e-3)  # s0 = z0 xor z1 is not linear in them


def test_information_that_is_only_rounding_does_not_count():
    """A latent independent of every source, in counts for which scikit-learn's estimate is 4e-16 and not 0."""
    pairs = grid(2, 2).repeat([64, 64, 56, 56], axis=0)
    assert 0 < mutual_info_score(pairs[:, 0], pairs[:, 1]) < 1e-15
    with pytest.warns(UserWarning, match="InfoM leaves out 1 of 2 active latents"):
        info_mec(pairs[:, [0, 0]], pairs, discrete=True)


def test_constant_source_is_left_out_with_a_warning(sources):
    constant = np.concatenate([sources, np.full((len(sources), 1), 3)], axis=1)
    with pytest.warns(UserWarning, match="never change are left out: 3"):
        scores = info_mec(constant, sources, discrete=True)
    assert scores.modularity == pytest.approx(1)
    assert scores.compactness == pytest.approx(1)
    assert scores.explicitness == pytest.approx(1, abs=1e-2)
    assert np.isnan(scores.nmi[3]).all()
    assert np.isfinite(scores.nmi[:3]).all()


def test_one_active_latent_leaves_compactness_undefined(sources):
    latents = np.stack([sources[:, 0], np.zeros(len(sources))], axis=1)
    with pytest.warns(UserWarning, match="InfoC is undefined with 1 active latents"):
        scores = info_mec(sources, latents, discrete=True)
    assert np.isnan(scores.compactness)
    assert scores.modularity == pytest.approx(1)


def test_one_source_leaves_modularity_undefined(sources):
    with pytest.warns(UserWarning, match="InfoM is undefined with 1 sources"):
        scores = info_mec(sources[:, :1], sources[:, :2], discrete=True)
    assert np.isnan(scores.modularity)


def test_no_active_latent_leaves_both_undefined_and_explicitness_zero(sources):
    with pytest.warns(UserWarning, match="InfoC is undefined with 0 active latents"), pytest.warns(match="InfoM"):
        scores = info_mec(sources, np.zeros((len(sources), 2)), discrete=True)
    assert np.isnan(scores.modularity)
    assert np.isnan(scores.compactness)
    assert scores.explicitness == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("discrete", [True, False])
def test_order_of_samples_latents_and_sources_does_not_matter(sources, rng, discrete):
    latents = sources + (rng.integers(0, 2, sources.shape) if discrete else rng.standard_normal(sources.shape))
    rows = rng.permutation(len(sources))
    one = info_mec(sources, latents, discrete=discrete)
    other = info_mec(sources[rows][:, [2, 0, 1]], latents[rows][:, [1, 2, 0]], discrete=discrete)
    assert other.modularity == pytest.approx(one.modularity, abs=1e-6)
    assert other.compactness == pytest.approx(one.compactness, abs=1e-6)
    assert other.explicitness == pytest.approx(one.explicitness, abs=1e-4)


def test_tensors_arrays_and_parallel_runs_agree(sources):
    expected = info_mec(sources, sources, discrete=True)
    tensors = info_mec(torch.tensor(sources), torch.tensor(sources, requires_grad=False).bfloat16(), discrete=True)
    with joblib.parallel_config("threading"):
        spread = info_mec(sources.tolist(), sources, discrete=True, n_jobs=2)
    for scores in (tensors, spread):
        assert scores.modularity == expected.modularity
        assert scores.explicitness == expected.explicitness
        assert np.array_equal(scores.nmi, expected.nmi)


def test_float_sources_that_are_labels_are_read_as_labels(sources):
    assert info_mec(sources / 7, sources, discrete=True).modularity == pytest.approx(1)


@pytest.mark.parametrize(
    ("sources", "latents", "options", "words"),
    [
        (grid(3, 3)[:, 0], grid(3, 3), {"discrete": True}, "sources have shape"),
        (grid(3, 3), grid(3, 3)[:8], {"discrete": True}, "9 samples of sources but 8"),
        (grid(3, 3), np.full((9, 2), np.nan), {"discrete": False}, "latents contain NaN"),
        (np.linspace(0, 1, 18).reshape(9, 2), grid(3, 3), {"discrete": True}, "Source 0 .* cut it into bins"),
        (grid(3, 3), np.linspace(0, 1, 18).reshape(9, 2), {"discrete": True}, "Latent 0 .* discrete=False"),
        (grid(3, 3), np.linspace(0, 1, 18).reshape(9, 2), {"discrete": False}, "smaller n_neighbors"),
        (np.zeros((0, 2)), np.zeros((0, 2)), {"discrete": True}, "sources have shape"),
    ],
)
def test_bad_input_is_one_sentence(sources, latents, options, words):
    with pytest.raises(UserError, match=words):
        info_mec(sources, latents, **options)


@pytest.mark.parametrize("predictor", ["boosted_trees", "random_forest", "lasso"])
def test_dci_of_copies_is_one(sources, predictor):
    scores = dci(sources, sources[:, [1, 2, 0]].astype(float), predictor=predictor)
    assert scores.disentanglement == pytest.approx(1, abs=0.02)
    assert scores.completeness == pytest.approx(1, abs=0.02)
    assert scores.informativeness > 0.95
    assert scores.importance.argmax(axis=0).tolist() == [2, 0, 1]


def test_dci_equals_its_formula_on_the_importances(sources, rng):
    latents = sources @ rng.standard_normal((3, 4)) + 0.1 * rng.standard_normal((len(sources), 4))
    scores = dci(sources, latents, predictor="random_forest")
    importance = scores.importance
    rows = importance / importance.sum(1, keepdims=True)
    columns = importance / importance.sum(0)
    per_latent = 1 + xlogy(rows, rows).sum(1) / np.log(3)
    per_source = 1 + xlogy(columns, columns).sum(0) / np.log(4)
    weight = importance.sum(1) / importance.sum()
    assert scores.disentanglement == pytest.approx(weight @ per_latent, abs=1e-12)
    assert scores.completeness == pytest.approx(per_source.mean(), abs=1e-12)
    assert scores.disentanglement < 0.8


def test_dci_lasso_ignores_unused_latents(sources, rng):
    latents = np.concatenate([sources, rng.standard_normal((len(sources), 2)), np.ones((len(sources), 1))], axis=1)
    scores = dci(sources, latents, predictor="lasso", alpha=0.2)
    assert scores.disentanglement == pytest.approx(1)
    assert scores.completeness == pytest.approx(1)
    assert scores.informativeness == pytest.approx(0.8, abs=0.03)  # the penalty shrinks each coefficient by 0.2


def test_mig_closed_forms(sources):
    assert mig(sources, sources, discrete=True) == pytest.approx(1)
    assert mig(sources, sources[:, [0, 1, 2, 2]], discrete=True) == pytest.approx(2 / 3)
    assert mig(sources, np.tile(sources.sum(1, keepdims=True), 2), discrete=True) == pytest.approx(0)
    assert mig(sources, sources * 0.1, discrete=False) == pytest.approx(1)


def test_mig_bins_have_equal_width():
    source = np.array([[0], [0], [1], [1]]).repeat(3, axis=0)
    latents = np.stack([np.array([0.0, 0.1, 0.9, 1.0]).repeat(3), np.zeros(12)], axis=1)
    assert mig(source, latents, discrete=False, bins=2) == pytest.approx(1)
    assert mig(source, latents, discrete=False, bins=1) == pytest.approx(0)


def test_sap_of_copies_is_the_gap_to_chance():
    sources = grid(2, 2, repeat=100)
    latents = np.stack([sources[:, 0], sources[:, 1], np.zeros(400)], axis=1)
    assert sap(sources, latents) == pytest.approx(0.5, abs=0.1)
    assert sap(sources, latents[:, [0, 0, 1, 1]]) == pytest.approx(0)


def test_single_latent_has_no_gap(sources):
    with pytest.warns(UserWarning, match="MIG is undefined with 1 latent"):
        assert np.isnan(mig(sources, sources[:, :1], discrete=True))
    with pytest.warns(UserWarning, match="SAP is undefined with 1 latent"):
        assert np.isnan(sap(sources, sources[:, :1]))


def test_bad_options_are_one_sentence(sources):
    with pytest.raises(UserError, match="did you mean 'random_forest'"):
        dci(sources, sources, predictor="random_forst")
    with pytest.raises(UserError, match="no split"):
        sap(sources, sources, test_fraction=1.0)
