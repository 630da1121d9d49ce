"""Each check fires where it should, stays silent where it should, and says when there is nothing to judge by."""

import math
import random

import pytest

from stillhouse.report.health import checks, falling_share
from stillhouse.report.reading import read_run

FINITE, DEAD, FALLING, BEST, ALONE, TEACHER, LEARNED = range(7)


def judged(writer, which):
    return checks(read_run(writer.path))[which]


def curve(values, name="loss/ce", **more):
    return [{"stage": "student", "step": 10 * (i + 1), name: v, **more} for i, v in enumerate(values)]


def decay(rate, count=50, noise=0.0):
    draws = random.Random(0)
    return [0.3 + 2 * math.exp(-rate * i / count) + noise * draws.gauss(0, 1) for i in range(count)]


def two_terms(small, weight=1.0, count=8):
    scale = {} if weight == 1 else {"loss/pull/scale": small * weight}
    return curve([2.0] * count, **{"loss/pull": small}, **scale)


@pytest.mark.parametrize(
    ("small", "weight", "state"), [(1e-3, 1.0, "warn"), (3e-3, 1.0, "good"), (0.5, 1e-3, "warn"), (1e-3, 10.0, "good")]
)
def test_a_term_is_dead_by_its_weighted_size(writer, small, weight, state):
    writer.stage().rows(two_terms(small, weight))
    found = judged(writer, DEAD)
    assert found.state == state
    assert all("pull adds" in sentence and "where ce adds 2" in sentence for sentence in found.found)
    assert len(found.found) == (state == "warn")


def test_a_term_that_is_zero_is_dead(writer):
    writer.stage().rows(two_terms(0.0))
    assert judged(writer, DEAD).found == (
        "Stage student: pull adds 0 to the loss where ce adds 2: it may do nothing; raise its weight, or set it to 0 and "
        "compare.",
    )


def sampled(shares, update="loss"):
    """Rows with each term's share of the gradient, sized alike."""
    return [
        {"stage": "student", "step": 10 * (i + 1)}
        | {f"{update}/{name}": 1.0 for name in row}
        | {f"{update}/{name}/gradient_share": share for name, share in row.items()}
        for i, row in enumerate(shares)
    ]


@pytest.mark.parametrize(
    ("shares", "found"),
    [
        ([{"ce": 0.9995, "pull": 0.0005}] * 4, "pull gives 0.05 % of the gradient of the loss, 3 samples in a row"),
        ([{"ce": 0.995, "pull": 0.005}] * 4, "ce gives 99.5 % of the gradient of the loss, 3 samples in a row"),
        ([{"ce": 0.9, "pull": 0.1}] * 4, None),
        ([{"ce": 0.9995, "pull": 0.0005}, {"ce": 0.9, "pull": 0.1}] * 4, None),
    ],
)
def test_shares_of_the_gradient_decide_where_they_were_sampled(writer, shares, found):
    writer.stage().rows(sampled(shares))
    check = judged(writer, DEAD)
    assert check.state == ("good" if found is None else "warn")
    assert len(check.found) == (found is not None)
    assert found is None or check.found[0].startswith(f"Stage student: {found}")


def test_too_few_samples_leave_the_judgement_to_the_sizes(writer):
    rows = sampled([{"ce": 0.5, "pull": 0.5}] * 2)
    writer.stage().rows([{**row, "loss/pull": 1e-5} for row in rows])
    (sentence,) = judged(writer, DEAD).found
    assert "pull adds 1e-05 to the loss where ce adds 1" in sentence


def test_a_small_term_with_a_fair_share_is_not_dead(writer):
    rows = sampled([{"ce": 0.5, "pull": 0.5}] * 4)
    writer.stage().rows([{**row, "loss/pull": 1e-5} for row in rows])
    assert judged(writer, DEAD).state == "good"


def test_terms_of_different_updates_are_not_compared(writer):
    writer.stage(updates=("loss", "critic")).rows(curve([2.0] * 8, **{"critic/fit": 1e-9}))
    assert judged(writer, DEAD).state == "open"


def test_negative_terms_count_by_their_size(writer):
    writer.stage().rows(two_terms(-0.5))
    assert judged(writer, DEAD).state == "good"


@pytest.mark.parametrize(("rate", "noise", "state"), [(1.0, 0.01, "warn"), (8.0, 0.01, "good"), (8.0, 0.3, "good")])
def test_a_loss_that_still_falls_at_the_end_is_said(writer, rate, noise, state):
    writer.stage(steps=500).rows(curve(decay(rate, noise=noise)))
    assert judged(writer, FALLING).state == state


def test_a_stage_that_still_runs_is_not_judged_by_its_end(writer):
    writer.stage(steps=1000).rows(curve(decay(1.0)))
    assert judged(writer, FALLING).state == "open"


def test_a_falling_weight_is_no_falling_loss(writer):
    rows = [{**row, "loss/ce/scale": 1.0 - row["step"] / 600} for row in curve([1.0] * 50)]
    writer.stage(steps=500).rows(rows)
    assert judged(writer, FALLING).state == "good"


def test_falling_share_is_a_fifth_for_a_straight_line_and_nothing_for_a_rise():
    line = [(s, 5.0 - s / 100) for s in range(1, 101)]
    assert falling_share(line) == pytest.approx(0.19 * 100 / 97, rel=0.02)
    assert falling_share([(s, -v) for s, v in line]) == 0
    assert falling_share([(s, 1.0) for s, _ in line]) == 0


def test_a_fall_within_the_noise_is_none():
    fall = [(s, 2.0 - s / 25) for s in range(40)]
    noise = [(40 + i, 0.4 + (0.5 if i % 2 == 0 else -0.5)) for i in range(10)]
    quiet = [(s, 0.4 + 0.05 * (v - 0.4) - (s - 40) / 50) for s, v in noise]
    assert falling_share(fall + noise) == 0
    assert falling_share(fall + quiet) > 0.05


def measured(values, name="validation/accuracy"):
    return curve(values, name=name)


OVERFIT = [0.5, 0.7, 0.8, 0.9, 0.88, 0.86, 0.84, 0.83, 0.82, 0.81]


def test_overfitting_is_said_with_the_step(writer):
    writer.stage().rows(measured(OVERFIT))
    (sentence,) = judged(writer, BEST).found
    assert "validation/accuracy was best at step 40 of 100 (0.9) and is 0.81 at the end" in sentence
    assert "keep=best" in sentence


def test_best_weights_that_were_kept_are_said_to_be(writer):
    writer.text("recipe.yaml", "method: sinkd\nkeep: best\n").stage().rows(measured(OVERFIT))
    assert "the best weights were kept" in judged(writer, BEST).found[0]


@pytest.mark.parametrize(
    "values",
    [
        [0.5, 0.7, 0.8, 0.85, 0.87, 0.88, 0.89, 0.89, 0.9, 0.9],
        [0.5, 0.7, 0.8, 0.901, 0.9, 0.899, 0.9, 0.9, 0.9, 0.9],
        [0.93, 0.9861, 0.9833, 0.9833, 0.9833, 0.9833, 0.9833],
        [0.5, 0.98, 0.94, 0.94, 0.94, 0.94, 0.94],
    ],
    ids=["rising", "plateau", "one sample", "one lucky step"],
)
def test_a_plateau_is_no_overfitting(writer, values):
    writer.stage(steps=10 * len(values)).rows(measured(values))
    assert judged(writer, BEST).state == "good"


def test_a_collapse_in_one_step_is_said(writer):
    writer.stage(steps=70).rows(measured([0.5, 0.7, 0.9, 0.1, 0.1, 0.1, 0.1]))
    assert judged(writer, BEST).state == "warn"


def test_less_is_better_where_the_name_says_so(writer):
    writer.stage(steps=70).rows(measured([3.0, 2.0, 1.0, 1.2, 1.4, 1.6, 1.8], name="validation/nll"))
    assert "best at step 30" in judged(writer, BEST).found[0]


def test_the_checkpoint_tells_which_measurement_was_watched(writer):
    rows = [
        {"stage": "student", "step": 10 * (i + 1), "validation/accuracy": a, "beta": b}
        for i, (a, b) in enumerate([(0.5, 9.0), (0.6, 2.0), (0.7, 3.0), (0.8, 4.0), (0.9, 5.0)])
    ]
    best = {"value": 2.0, "step": 20, "metrics": {"validation/accuracy": 0.6, "beta": 2.0}}
    writer.stage(steps=50).rows(rows).json("checkpoints/student/end/tree.json", {"best": best})
    assert "beta was best at step 20" in judged(writer, BEST).found[0]


def test_a_measurement_without_a_known_direction_is_not_judged(writer):
    writer.stage().rows(measured(OVERFIT, name="beta"))
    assert judged(writer, BEST).state == "open"


@pytest.mark.parametrize(
    ("student", "alone", "teacher", "states"),
    [
        (0.9, 0.8, 0.95, ("good", "good")),
        (0.8, 0.9, 0.95, ("warn", "good")),
        (0.9, 0.8, 0.85, ("good", "warn")),
        (0.9, 0.9, 0.9, ("good", "good")),
    ],
)
def test_the_student_is_compared_with_itself_alone_and_with_its_teacher(writer, student, alone, teacher, states):
    accuracies = {"student": student, "student-alone": alone, "teacher": teacher}
    writer.json("metrics.json", {f"test/{name}/accuracy": value for name, value in accuracies.items()})
    assert (judged(writer, ALONE).state, judged(writer, TEACHER).state) == states


def test_errors_are_compared_the_other_way_round(writer):
    writer.json("metrics.json", {"test/student/mse": 0.2, "test/student-alone/mse": 0.1, "test/teacher/mse": 0.3})
    assert "(0.2)" in judged(writer, ALONE).found[0]
    assert "(0.3) is worse than the student (0.2) in mse" in judged(writer, TEACHER).found[0]


def test_a_teacher_with_fewer_steps_is_there_to_be_beaten(writer):
    numbers = {"test/teacher/frechet": 1.0, "test/teacher-1-step/frechet": 10.0, "test/student/frechet": 2.0}
    writer.json("metrics.json", numbers)
    assert judged(writer, TEACHER).state == "good"


def test_one_teacher_of_several_can_be_the_worse_one(writer):
    numbers = {"test/teacher-0/accuracy": 0.9, "test/teacher-1/accuracy": 0.7, "test/student/accuracy": 0.8}
    writer.json("metrics.json", numbers)
    (sentence,) = judged(writer, TEACHER).found
    assert sentence.startswith("The teacher-1 (0.7)")


def test_numbers_that_are_not_finite_are_named(writer):
    writer.stage().rows(curve([1.0, None, 1.0])).finish(fid=math.nan)
    assert judged(writer, FINITE).found == ("NaN or infinite: loss/ce in stage student, fid.",)


def test_nothing_is_judged_in_an_empty_run(writer):
    assert [check.state for check in checks(read_run(writer.path))] == ["open"] * 7
    assert all(check.found[0].startswith("Not judged: ") for check in checks(read_run(writer.path)))


def test_a_run_without_trouble_is_good_all_over(writer):
    rows = curve(decay(8.0), **{"loss/kd": 0.5}) + measured([0.5, 0.7, 0.8, 0.9, 0.9])
    numbers = {"test/student/accuracy": 0.9, "test/student-alone/accuracy": 0.8, "test/teacher/accuracy": 0.95}
    writer.stage(steps=500).rows(rows).json("metrics.json", numbers)
    assert [check.state for check in checks(read_run(writer.path))] == ["good"] * 7
