"""Sinkhorn distance, loss and backward: stillhouse beside POT, geomloss and plain autograd, in one run.

    python benchmarks/sinkhorn.py --batch 128 --classes 1000

Two tables are printed. In the first each solver runs the fewest rounds (of those it offers) that bring every row and
column sum within ``--tolerance`` of its marginal; the rounds are found beforehand and not timed, and no solver checks
convergence while it is timed. In the second all run the same number of rounds. "scaling" is from a cost matrix to the
gradient of the loss to it; "all" is from logits to the gradient of the loss to them, with the costs of the others from
``torch.cdist``. Times are medians of interleaved repeats; memory is the peak of what torch holds beyond the inputs.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from measuring import peak_memory
from stillhouse.losses import pairwise_l1, sinkhorn, sinkhorn_distance

Plan = Callable[[Tensor, float, float], Tensor]


def stillhouse(cost: Tensor, epsilon: float, rounds: float) -> Tensor:
    return sinkhorn(cost, epsilon, int(rounds))


def autograd_plain(cost: Tensor, epsilon: float, rounds: float) -> Tensor:
    plan = torch.exp(-cost / epsilon)
    for _ in range(int(rounds)):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return plan


def autograd_log(cost: Tensor, epsilon: float, rounds: float) -> Tensor:
    log_plan = -cost / epsilon
    for _ in range(int(rounds)):
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
    return log_plan.exp()


def pot(method: str) -> Plan:
    import ot

    def plan(cost: Tensor, epsilon: float, rounds: float) -> Tensor:
        mass = cost.new_full((len(cost),), 1 / len(cost))
        return len(cost) * ot.sinkhorn(
            mass, mass, cost, epsilon, method=method, numItermax=int(rounds), stopThr=0.0, warn=False
        )

    return plan


def geomloss_solve(cost: Tensor, epsilon: float, rounds: float) -> Tensor:
    from geomloss import ot

    mass = cost.new_full((len(cost),), 1 / len(cost))
    return len(cost) * ot.solve(cost, a=mass, b=mass, reg=epsilon, max_iter=int(rounds)).plan


def geomloss_samples(student: Tensor, teacher: Tensor, epsilon: float, scaling: float, *, potentials: bool) -> Tensor:
    """geomloss' own loss (a dual value, differentiated at its fixed point) or the plan of its potentials."""
    from geomloss import SamplesLoss

    def cost(x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x, y, p=1)

    loss = SamplesLoss(
        "sinkhorn", p=1, blur=epsilon, scaling=scaling, cost=cost, debias=False, backend="tensorized",
        potentials=potentials,
    )  # fmt: skip
    if not potentials:
        return loss(student, teacher)
    f, g = (potential.view(-1) for potential in loss(student, teacher))
    return torch.exp((f[:, None] + g - cost(student, teacher)) / epsilon) / len(teacher)


@dataclass
class Solver:
    name: str
    plan: Plan | None
    settings: Iterable[float]

    def error(self, problem: Problem, setting: float) -> float:
        with torch.no_grad():
            if self.plan is None:
                plan = geomloss_samples(problem.p, problem.q, problem.epsilon, setting, potentials=True)
            else:
                plan = self.plan(problem.cost, problem.epsilon, setting)
        return max(float((plan.sum(dim) - 1).abs().max()) for dim in (0, 1))

    def scaling(self, problem: Problem, setting: float) -> None:
        assert self.plan is not None
        cost = problem.cost.clone().requires_grad_()
        (self.plan(cost, problem.epsilon, setting) * cost).sum().backward()

    def all(self, problem: Problem, setting: float) -> None:
        student = problem.student.clone().requires_grad_()
        if self.plan is stillhouse:
            loss = sinkhorn_distance(
                student, problem.teacher, epsilon=problem.epsilon, num_iterations=int(setting), reduction="sum"
            )
        else:
            p, q = F.softmax(student / 2, dim=-1), F.softmax(problem.teacher / 2, dim=-1)
            if self.plan is None:
                loss = geomloss_samples(p, q, problem.epsilon, setting, potentials=False)
            else:
                cost = torch.cdist(p, q, p=1)
                loss = (self.plan(cost, problem.epsilon, setting) * cost).sum()
        loss.backward()


class Problem:
    """Peaked predictions of a confident teacher and a less sure student, with samples that share a class."""

    def __init__(self, batch: int, classes: int, epsilon: float, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        labels = F.one_hot(torch.randint(max(1, classes // 10), (batch,), generator=generator), classes)
        noise = 2 * torch.randn(2, batch, classes, generator=generator)
        self.student = (noise[0] + 6 * labels).to(device)
        self.teacher = (noise[1] + 14 * labels).to(device)
        self.p, self.q = F.softmax(self.student / 2, dim=-1), F.softmax(self.teacher / 2, dim=-1)
        self.cost, self.epsilon, self.device = pairwise_l1(self.p, self.q), epsilon, device


def solvers() -> list[Solver]:
    counts = [*range(1, 20), *range(20, 100, 10), *range(100, 1000, 100), *range(1000, 5001, 1000)]
    return [
        Solver("stillhouse", stillhouse, counts),
        Solver("autograd, plain", autograd_plain, counts),
        Solver("autograd, log", autograd_log, counts),
        Solver("POT sinkhorn", pot("sinkhorn"), counts),
        Solver("POT sinkhorn_log", pot("sinkhorn_log"), counts),
        Solver("geomloss solve", geomloss_solve, counts),
        Solver("geomloss SamplesLoss", None, (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)),
    ]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(runs: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each run; the repeats of all runs are interleaved, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-3, repeats):
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if repeat >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def table(title: str, problem: Problem, settings: list[tuple[Solver, float]], repeats: int) -> None:
    print(f"\n{title}")
    columns = "setting", "error", "scaling ms", "ratio", "all ms", "ratio", "all MiB", "ratio"
    print(f"{'':22}" + "".join(f"{column:>11}" for column in columns))
    scaling = {s.name: (lambda s=s, x=x: s.scaling(problem, x)) for s, x in settings if s.plan is not None}
    whole = {s.name: (lambda s=s, x=x: s.all(problem, x)) for s, x in settings}
    scaling_ms, all_ms = (medians(runs, repeats, problem.device) for runs in (scaling, whole))
    memory = {name: peak_memory(run, problem.device) for name, run in whole.items()}
    first = settings[0][0].name
    for solver, setting in settings:
        row = f"{solver.name:22}{setting:>11g}{solver.error(problem, setting):>11.1e}"
        for values in (scaling_ms, all_ms, memory):
            value = values.get(solver.name)
            row += f"{'-':>11}{'-':>11}" if value is None else f"{value:>11.2f}{value / values[first]:>11.2f}"
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--epsilon", type=float, default=0.1)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of row and column sums, whose marginals are 1")
    parser.add_argument("--rounds", type=int, default=20, help="of the second table")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True to a scalar")

    device = torch.device(options.device)
    problem = Problem(options.batch, options.classes, options.epsilon, options.seed, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {options.threads} thread(s)"
    print(
        f"{options.batch} x {options.classes}, epsilon {options.epsilon:g}, costs {float(problem.cost.min()):.2f} to "
        f"{float(problem.cost.max()):.2f}, {name}, torch {torch.__version__}, {options.repeats} repeats"
    )

    reached: list[tuple[Solver, float]] = []
    for solver in solvers():
        setting = next((x for x in solver.settings if solver.error(problem, x) <= options.tolerance), None)
        if setting is None:
            print(f"{solver.name} does not come within {options.tolerance:g}")
        else:
            reached.append((solver, setting))
    table(f"Equal tolerance: sums within {options.tolerance:g}", problem, reached, options.repeats)
    same = [(solver, float(options.rounds)) for solver in solvers() if solver.plan is not None]
    table(f"Equal rounds: {options.rounds}", problem, same, options.repeats)


if __name__ == "__main__":
    main()
