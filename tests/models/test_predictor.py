"""Teachers of scikit-learn's kind: their probabilities as logits, the order of classes, and a whole distillation."""

import numpy as np
import pytest
import torch
from sklearn.ensemble import GradientBoostingRegressor, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.svm import LinearSVC

import stillhouse as sh
from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models import ModelSpec, Predictor, fingerprint

FACTS = Facts(inputs={"features": (4,)}, num_classes=3, task="classification")
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(300, 4, generator=GENERATOR)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()


def forest(y=Y, **arguments):
    return RandomForestClassifier(20, random_state=0, **arguments).fit(X.numpy(), y.numpy())


def test_logits_are_the_logarithms_of_its_probabilities():
    estimator = forest()
    logits = ModelSpec.parse(estimator).build(FACTS)(X)
    assert torch.allclose(
        logits.softmax(-1), torch.tensor(estimator.predict_proba(X.numpy()), dtype=torch.float32), atol=1e-5
    )
    assert torch.isfinite(logits).all()


def test_columns_follow_the_classes_that_it_knows():
    seen = Y != 1
    estimator = RandomForestClassifier(5, random_state=0).fit(X[seen].numpy(), Y[seen].numpy())
    logits = Predictor(estimator, FACTS)(X)
    assert logits.shape == (300, 3)
    assert (logits[:, 1].exp() < 1e-5).all()
    named = Facts(inputs=FACTS.inputs, num_classes=3, task="classification", class_names=("c", "a", "b"))
    words = RandomForestClassifier(5, random_state=0).fit(X.numpy(), np.array(["a", "b", "c"])[Y.numpy()])
    said = [named.class_names.index(word) for word in words.predict(X.numpy())]
    assert Predictor(words, named)(X).argmax(1).tolist() == said


def test_two_estimators_are_told_apart():
    a, b, again = (Predictor(forest(max_depth=depth), FACTS) for depth in (2, 3, 2))
    assert fingerprint(a) == fingerprint(again) != fingerprint(b)
    assert ModelSpec.parse(a.estimator).digest() == ModelSpec.parse(again.estimator).digest()
    assert ModelSpec.parse(a.estimator).digest() != ModelSpec.parse(b.estimator).digest()


@pytest.mark.parametrize("cache", [False, True])
def test_a_boosted_teacher_is_distilled(cache, tmp_path):
    teacher = HistGradientBoostingClassifier(max_iter=30, random_state=0).fit(X.numpy(), Y.numpy())
    fields = {
        "teacher": teacher,
        "student": "mlp:16",
        "data": (X, Y),
        "epochs": 60,
        "cache_teacher": cache,
        "optimizer": {"lr": 1e-2},
    }
    result = sh.distil("kd", **fields, compare_alone=False)
    assert result.metrics["test/student/accuracy"] > 0.8
    assert result.metrics["test/student/agreement"] > 0.75
    assert list(result.artefacts) == ["student"]


def test_a_regressor_teaches_numbers():
    y = X[:, 0] + X[:, 1]
    teacher = GradientBoostingRegressor(random_state=0).fit(X.numpy(), y.numpy())
    result = sh.distil(
        "kd", teacher=teacher, student="mlp:16", data=(X, y), epochs=60, optimizer={"lr": 1e-2}, compare_alone=False
    )
    assert result.metrics["test/student/mse"] < 0.5


def test_an_import_path_may_name_or_make_one(tmp_path, monkeypatch):
    (tmp_path / "their_forest.py").write_text(
        "import torch\nfrom sklearn.ensemble import RandomForestClassifier\n"
        "def make(trees=3):\n"
        "    x = torch.arange(12.).view(3, 4).numpy()\n"
        "    return RandomForestClassifier(trees, random_state=0).fit(x, [0, 1, 2])\n"
        "made = make()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for spec in ("their_forest:made", {"kind": "import", "path": "their_forest:make", "arguments": {"trees": 2}}):
        assert isinstance(ModelSpec.parse(spec).build(FACTS), Predictor)


def test_what_cannot_teach_is_refused():
    with pytest.raises(UserError, match="RandomForestClassifier is not fitted; call its fit first"):
        Predictor(RandomForestClassifier(), FACTS)
    with pytest.raises(UserError, match="LinearSVC has no predict_proba"):
        Predictor(LinearSVC().fit(X.numpy(), Y.numpy()), FACTS)
    with pytest.raises(UserError, match=r"predicts the class np.int64\(5\), which the data does not have"):
        Predictor(forest(Y + 5), FACTS)
    with pytest.raises(UserError, match="runs only with the object passed again"):
        sh.distil("kd", teacher=ModelSpec.parse(forest()).dump(), data=(X, Y))
    with pytest.raises(UserError, match="trains: 'model' has no parameters"):
        sh.distil("kd", teacher="mlp:4", student=forest(), data=(X, Y), epochs=1)
