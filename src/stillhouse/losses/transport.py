"""Optimal transport between the predictions of a batch: pairwise costs, Sinkhorn scaling and the Sinkhorn distance.

Rows are student samples and columns are teacher samples throughout. Everything runs in float32 (float64 inputs stay
float64), also under autocast.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError

# Elements of the temporary that holds differences of pairs: on a CPU it should stay in the second-level cache, on an
# accelerator it should be large enough to fill the device and small beside a model.
_CPU_BUFFER = 2**17
_ACCELERATOR_BUFFER = 2**26

# Rounds of scaling between two looks at the tolerance, when one is given.
_CHECK = 10


def pairwise_l1(
    student_probs: Float[Tensor, "rows classes"],
    teacher_probs: Float[Tensor, "columns classes"],
    chunk: int | None = None,
) -> Float[Tensor, "rows columns"]:
    """The cost ``W_ij = || p_i - q_j ||_1`` between every student row and every teacher row (SinKD, step 1).

    For probabilities it lies in [0, 2] and is twice the total variation. The gradient goes to the student only. The
    ``rows x columns x classes`` differences are never held, in either direction (only ``create_graph=True`` does hold
    them).

    Args:
        student_probs: points of the rows, usually softmax outputs; any real values work.
        teacher_probs: points of the columns; a constant.
        chunk: classes handled at once; chosen from the shapes and the device when not given.

    Returns:
        The costs, float32 (float64 for float64 inputs).

    Raises:
        UserError: the numbers of classes differ, or ``chunk`` is below 1.

    >>> pairwise_l1(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]))
    tensor([[0., 1., 2.]])
    """
    for name, probs in (("student_probs", student_probs), ("teacher_probs", teacher_probs)):
        if probs.dim() != 2:
            raise UserError(f"pairwise_l1: {name} needs the shape (samples, classes), not {tuple(probs.shape)}.")
    _same_classes("pairwise_l1", "student_probs", student_probs, "teacher_probs", teacher_probs)
    if chunk is not None and chunk < 1:
        raise UserError(f"pairwise_l1: chunk is a number of classes of at least 1, not {chunk}.")
    cost: Tensor = _PairwiseL1.apply(_wide(student_probs), _wide(teacher_probs).detach(), chunk)  # type: ignore[no-untyped-call]
    return cost


class _PairwiseL1(torch.autograd.Function):
    """L1 costs whose memory is the cost itself, the gradient and one bounded buffer.

    ``torch.cdist`` alone will not do: its CUDA backward allocates ``rows x columns x classes``, and its CPU forward
    adds up in one long dependent chain, 2.5 times slower than blocks that stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, chunk: int | None) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.chunk = chunk
        if student.device.type != "cpu":
            return sum(  # type: ignore[return-value]
                torch.cdist(rows, columns, p=1.0)
                for rows, columns in zip(_by_class(student, chunk), _by_class(teacher, chunk), strict=True)
            )
        chunk = chunk or 128
        cost = student.new_zeros(len(student), len(teacher))
        height = max(1, _CPU_BUFFER // max(1, len(teacher) * min(chunk, student.shape[1])))
        for rows, block in zip(torch.split(student, height), torch.split(cost, height), strict=True):
            for row_part, column_part in zip(_by_class(rows, chunk), _by_class(teacher, chunk), strict=True):
                block += torch.sub(row_part[:, None], column_part).abs_().sum(-1)
        return cost

    @staticmethod
    def backward(ctx: Any, grad_cost: Tensor) -> tuple[Tensor, None, None]:
        student, teacher = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the same in plain torch, which can be differentiated again
            cost = (student[:, None] - teacher).abs().sum(-1)
            return *torch.autograd.grad(cost, student, grad_cost, create_graph=True), None, None
        chunk, classes = ctx.chunk, student.shape[1]
        if chunk is None:
            buffered = student.device.type != "cpu"
            chunk = max(1, _ACCELERATOR_BUFFER // max(1, grad_cost.numel())) if buffered else classes
        grad_cost = grad_cost.contiguous()
        if chunk >= classes:
            return _l1_gradient(student, teacher, grad_cost), None, None
        grad = torch.empty_like(student)
        for rows, columns, out in zip(*(_by_class(t, chunk) for t in (student, teacher, grad)), strict=True):
            out.copy_(_l1_gradient(rows, columns, grad_cost))
        return grad, None, None


def _l1_gradient(student: Tensor, teacher: Tensor, grad_cost: Tensor) -> Tensor:
    """``sum_j grad_cost_ij sign(p_ik - q_jk)``; for p = 1 the distances, the last argument, are not read."""
    grad: Tensor = torch.ops.aten._cdist_backward(grad_cost, student.contiguous(), teacher.contiguous(), 1.0, grad_cost)
    return grad


def _by_class(tensor: Tensor, chunk: int | None) -> tuple[Tensor, ...]:
    return (tensor,) if chunk is None else torch.split(tensor, chunk, dim=-1)


def sinkhorn(
    cost: Float[Tensor, "rows columns"],
    epsilon: float,
    num_iterations: int,
    *,
    row_marginal: Float[Tensor, " rows"] | None = None,
    column_marginal: Float[Tensor, " columns"] | None = None,
    order: Literal["rows_first", "columns_first"] = "rows_first",
    tolerance: float | None = None,
) -> Float[Tensor, "rows columns"]:
    """Scale ``exp(-cost / epsilon)`` to given marginals in ``num_iterations`` rounds (Sinkhorn-Knopp).

    Each round normalises the rows, then the columns (``order`` swaps them), so the side that comes last holds its
    marginal exactly and the other approximately: see :func:`row_error`. The result is that of scaling in the log
    domain at any ``epsilon``, and the gradient (to ``cost`` only) is that of all rounds, unrolled; yet it needs memory
    for the plan and two vectors a round, not for a plan a round.

    Args:
        cost: any finite costs; a constant added to all of them changes nothing.
        epsilon: entropic regularisation, in units of the cost.
        num_iterations: rounds; the most rounds when ``tolerance`` is given.
        row_marginal: positive mass of each row, a constant; ones when not given.
        column_marginal: positive mass of each column, a constant, of the same total; by default the rows' total in
            equal parts, so ones for a square cost: a balanced assignment.
        order: which side a round normalises first.
        tolerance: stop when the side normalised first misses its marginal by at most this much anywhere. It is looked
            at every few rounds (at most ten) and makes the host wait for the device; without it nothing does.

    Returns:
        The plan, float32 (float64 for a float64 cost).

    Raises:
        UserError: ``epsilon`` or ``tolerance`` not above 0, fewer than 1 round, a marginal of the wrong shape or
            total, a cost that is not a matrix.

    >>> cost = torch.tensor([[0.0, 2.0], [1.0, 0.5]])
    >>> plan = sinkhorn(cost, epsilon=0.5, num_iterations=50)
    >>> plan
    tensor([[0.9241, 0.0759],
            [0.0759, 0.9241]])
    """
    if cost.dim() != 2 or cost.numel() == 0:
        raise UserError(f"sinkhorn: cost is a non-empty matrix (rows, columns), not of shape {tuple(cost.shape)}.")
    if order not in ("rows_first", "columns_first"):
        raise UserError(f"sinkhorn: order is 'rows_first' or 'columns_first', not {order!r}.")
    _check_scaling("sinkhorn", epsilon, num_iterations)
    if tolerance is not None and not tolerance > 0:
        raise UserError(f"sinkhorn: tolerance is above 0, not {tolerance}.")
    cost = _wide(cost)
    rows, columns = _marginals(cost, row_marginal, column_marginal)
    if order == "columns_first":
        cost, rows, columns = cost.t(), columns, rows
    even = row_marginal is None and column_marginal is None
    spread = None
    if even and cost.device.type == "cpu":
        lowest, highest = cost.detach().aminmax()
        spread = float(highest) - float(lowest)
    interval = _rounds_between_absorptions(cost, epsilon, even=even, spread=spread)
    plan: Tensor = _Scaling.apply(cost, rows, columns, epsilon, num_iterations, interval, tolerance)  # type: ignore[no-untyped-call]
    return plan.t() if order == "columns_first" else plan


class _Scaling(torch.autograd.Function):
    """Stabilised Sinkhorn scaling, with the exact derivative of its unrolled rounds.

    Plain scaling of K = exp(-W/eps) costs two matrix-vector products a round, but K underflows; scaling in the log
    domain is safe, but takes two log-sum-exps of the matrix a round. Here (Schmitzer, "Stabilized Sparse Scaling
    Algorithms for Entropy Regularized Transport Problems", arXiv 1610.06519) the potentials f, g are kept as logarithms
    and absorbed into a fresh kernel exp(-W/eps + f + g) every ``interval`` rounds; in between, rounds are plain.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cost: Tensor,
        rows: Tensor,
        columns: Tensor,
        epsilon: float,
        num_iterations: int,
        interval: int | None,
        tolerance: float | None,
    ) -> Tensor:
        bounded = interval is None
        if interval is None:
            interval = num_iterations if tolerance is None else _CHECK
        with torch.autocast(cost.device.type, enabled=False):
            log_kernel = _log_kernel(cost, epsilon)
            if bounded:
                f, g = torch.zeros_like(rows), torch.zeros_like(columns)
                plan = kernel = log_kernel.exp()
            else:
                # The first round may divide by sums that vanish: log domain. Its last step is a softmax and not
                # exp(... + g), so that its columns sum to one to the last bits.
                f = rows.log() - log_kernel.logsumexp(1)
                log_kernel_f = log_kernel + f[:, None]
                g = columns.log() - log_kernel_f.logsumexp(0)
                plan = kernel = log_kernel_f.softmax(0).mul_(columns)
            plain = num_iterations if bounded else num_iterations - 1
            ctx.rounds = num_iterations - plain
            saved = [f, kernel]
            us: Tensor
            vs: Tensor
            for start in range(0, plain, interval):
                if start:
                    f, g = f + us[-1].log(), g + vs[-1].log()
                    kernel = _absorb(log_kernel, f, g)
                length = min(interval, plain - start)
                us, vs = cost.new_empty(length, len(rows)), cost.new_ones(length + 1, len(columns))
                saved += [f, g, us, vs]
                transposed, (v, *vs_next) = kernel.t(), vs.unbind()
                for u, v_next in zip(us.unbind(), vs_next, strict=True):
                    torch.div(rows, torch.mv(kernel, v, out=u), out=u)
                    v = torch.div(columns, torch.mv(transposed, u, out=v_next), out=v_next)
                ctx.rounds += length
                if tolerance is not None and bool((u * torch.mv(kernel, v) - rows).abs().max() <= tolerance):
                    break
            if plain:
                plan = (kernel * us[-1][:, None]).mul_(vs[-1])
        ctx.save_for_backward(cost, rows, columns, plan, *saved)
        ctx.epsilon, ctx.bounded = epsilon, bounded
        return plan

    @staticmethod
    def backward(ctx: Any, grad_plan: Tensor) -> tuple[Tensor | None, ...]:
        # With L = -W/eps and P the plan after a half-round, f_i = log a_i - log sum_j exp(L_ij + g_j) has the
        # derivative df_i = -sum_j P_ij (dL_ij + dg_j) / a_i, and likewise for g: the chain runs back through two
        # matrix-vector products a round, and a block's part of the gradient of L is one matrix product.
        cost, rows, columns, plan, first_f, kernel, *saved = ctx.saved_tensors
        first_kernel = kernel
        if torch.is_grad_enabled():  # create_graph=True: the same in plain torch, which can be differentiated again
            plan = _unrolled(cost, rows, columns, ctx.epsilon, ctx.rounds)
            return *torch.autograd.grad(plan, cost, grad_plan, create_graph=True), None, None, None, None, None, None
        with torch.autocast(cost.device.type, enabled=False):
            grad = grad_plan * plan
            grad_f, grad_g = grad.sum(1), grad.sum(0)
            # a float32 matrix product (unlike one with a vector) may be set to run in TF32 or bfloat16
            exact = cost.dtype if cost.device.type == "mps" else torch.float64
            for block in reversed(range(0, len(saved), 4)):
                f, g, us, vs = saved[block : block + 4]
                kernel = _absorb(_log_kernel(cost, ctx.epsilon), f, g) if block else first_kernel
                transposed = kernel.t()
                xs, ys = torch.empty_like(us), torch.empty_like(vs[1:])
                x, y = xs.unbind(), ys.unbind()
                through_rows, through_columns = (us.square() / -rows).unbind(), (vs.square() / -columns).unbind()
                torch.mul(vs[-1] / columns, grad_g, out=y[-1])
                for t in reversed(range(len(x))):
                    torch.mv(kernel, y[t], out=x[t]).mul_(through_rows[t])
                    if t == len(x) - 1:
                        x[t].addcmul_(us[t] / rows, grad_f)
                    if t:
                        torch.mv(transposed, x[t], out=y[t - 1]).mul_(through_columns[t])
                grad_f, grad_g = torch.zeros_like(grad_f), -torch.mv(transposed, x[0])
                left, right = torch.cat([us, xs]).to(exact), torch.cat([ys, vs[:-1]]).to(exact)
                grad.addcmul_(kernel, (left.t() @ right).to(grad), value=-1)
            if not ctx.bounded:
                y0 = grad_g / columns
                x0 = (grad_f - torch.mv(kernel, y0)) / rows
                grad.addcmul_(kernel, y0, value=-1)
                grad.addcmul_(_log_kernel(cost, ctx.epsilon).add_(first_f[:, None]).exp_(), x0[:, None], value=-1)
            return grad.mul_(-1 / ctx.epsilon), None, None, None, None, None, None


def _unrolled(cost: Tensor, rows: Tensor, columns: Tensor, epsilon: float, num_iterations: int) -> Tensor:
    log_plan = cost / -epsilon
    for _ in range(num_iterations):
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True) + rows.log()[:, None]
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True) + columns.log()
    return log_plan.exp()


def _log_kernel(cost: Tensor, epsilon: float) -> Tensor:
    # The plan does not change with a constant in the costs, so its derivative may ignore that the smallest is one.
    return (cost - cost.min()).mul_(-1 / epsilon)


def _absorb(log_kernel: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return torch.add(log_kernel, f[:, None]).add_(g).exp_()


def _rounds_between_absorptions(cost: Tensor, epsilon: float, *, even: bool, spread: float | None) -> int | None:
    """How many plain rounds may follow an absorption; any number for ``None``. No look at the data is needed.

    With a known spread of the costs (largest less smallest) R = spread/epsilon bounds the spread of either potential in
    any round, so no scaling, of which the backward takes the square, goes beyond exp(2R), and no absorbed entry is
    below exp(-3R): if those are representable nothing is ever lost.

    Otherwise, for even marginals: after a normalisation that follows another one, every row (column) has an entry of at
    least 1/size^2 of its mass. So no half-round multiplies a row (column) by more than size^2, or divides by a sum that
    vanishes, and an entry that underflows in an absorbed kernel may be dropped as long as what it could have grown to,
    times the size, is below the rounding of such a sum. For float32 that gives three rounds at 128 x 128.

    Uneven marginals can make the growth larger: every round absorbs.
    """
    info = torch.finfo(cost.dtype)
    if not even:
        return 1
    if spread is not None and 4 * spread / epsilon < -math.log(info.tiny):
        return None
    growth = max(1.0, 2 * math.log(max(cost.shape)))
    return max(1, min(_CHECK, int(((math.log(info.eps) - math.log(info.tiny)) / growth - 0.5) / 2)))


def sinkhorn_distance(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    num_iterations: int = 20,
    plan_grad: bool = True,
    form: Literal["batch", "sample"] = "batch",
    reduction: Literal["mean", "sum"] = "mean",
    chunk: int | None = None,
    check_finite: bool = True,
) -> Float[Tensor, ""]:
    """The Sinkhorn distance between the predictions of a batch, ``sum_ij P_ij W_ij`` (SinKD, arXiv 2402.17110).

    ``W`` are the L1 distances between the softmax outputs of every student sample and every teacher sample, ``P`` the
    plan that :func:`sinkhorn` scales from ``exp(-W / epsilon)``. The paper's term is ``reduction="sum"`` (times
    0.001 in the released code): its strength grows with the batch, so the default here is the mean over samples. The
    teacher is a constant.

    Args:
        student_logits: one row of class logits per sample. For sequences see :func:`select_positions`.
        teacher_logits: the same samples in the same order.
        temperature: softmax temperature of both sides; 2 in all of the paper's runs.
        epsilon: entropic regularisation, in units of ``W`` (which lies in [0, 2]). Large ones make the plan uniform
            and the term a matching of batch means.
        num_iterations: rounds of scaling.
        plan_grad: whether the gradient also runs through the plan (the paper) or only through ``W``.
        form: ``"batch"`` couples the samples; ``"sample"`` is the ablation ``sum_i || p_i - q_i ||_1``, which pairs
            each sample with itself.
        reduction: ``"mean"`` divides the sum by the batch size.
        chunk: classes handled at once in the costs; see :func:`pairwise_l1`.
        check_finite: refuse NaN and infinite logits on the CPU; False lets them through to the loss, for training
            loops with a guard of their own.

    Raises:
        UserError: different shapes, fewer than 2 classes, ``temperature`` or ``epsilon`` not above 0, fewer than 1
            round, or logits that are not finite (looked at on the CPU only: elsewhere the loss becomes NaN instead of
            waiting for the device).

    >>> student = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]], requires_grad=True)
    >>> teacher = torch.tensor([[0.0, 0.0, 2.0], [0.0, 2.0, 0.0]])
    >>> loss = sinkhorn_distance(student, teacher)
    >>> round(loss.item(), 4)
    0.376
    >>> loss.backward()
    """
    where = "sinkhorn_distance"
    if student_logits.dim() != 2:
        raise UserError(
            f"{where}: student_logits needs the shape (batch, classes), not {tuple(student_logits.shape)}; "
            "select_positions brings sequences into it."
        )
    _same_classes(where, "student_logits", student_logits, "teacher_logits", teacher_logits)
    if student_logits.shape != teacher_logits.shape or student_logits.numel() == 0:
        raise UserError(
            f"{where}: student_logits and teacher_logits need the same samples, at least one, but their shapes are "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}."
        )
    if student_logits.shape[1] < 2:
        raise UserError(
            f"{where}: student_logits has 1 class, but at least 2 are needed, because the softmax of a single logit is "
            "always 1; for regression switch the Sinkhorn term off."
        )
    if not 0 < temperature < math.inf:
        raise UserError(f"{where}: temperature is above 0, not {temperature}.")
    _check_scaling(where, epsilon, num_iterations)
    for name, value, valid in (("form", form, ("batch", "sample")), ("reduction", reduction, ("mean", "sum"))):
        if value not in valid:
            raise UserError(f"{where}: {name} is {valid[0]!r} or {valid[1]!r}, not {value!r}.")

    student_probs = F.softmax(_wide(student_logits) / temperature, dim=-1)
    teacher_probs = F.softmax(_wide(teacher_logits.detach()) / temperature, dim=-1)
    if form == "sample":
        total = (student_probs - teacher_probs).abs().sum()
    else:
        cost = pairwise_l1(student_probs, teacher_probs, chunk)
        mass = cost.new_ones(len(cost))
        interval = _rounds_between_absorptions(cost, epsilon, even=True, spread=2.0)
        plan = _Scaling.apply(cost if plan_grad else cost.detach(), mass, mass, epsilon, num_iterations, interval, None)  # type: ignore[no-untyped-call]
        total = (plan * cost).sum()
    if check_finite and total.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(total.isfinite()):
        for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            if bad := int((~logits.isfinite()).sum()):
                raise UserError(f"{where}: {name} has {bad} NaN or infinite values of {logits.numel()}.")
    return total / len(student_logits) if reduction == "mean" else total


def row_error(
    plan: Float[Tensor, "rows columns"], row_marginal: Float[Tensor, " rows"] | None = None
) -> Float[Tensor, ""]:
    """How far a plan's rows are from their marginal: ``max_i |sum_j P_ij - a_i|``, without gradient.

    Columns hold theirs exactly after ``order="rows_first"``. A large value means too few rounds for this ``epsilon``.

    Args:
        plan: what :func:`sinkhorn` returned.
        row_marginal: the mass wanted of each row; ones when not given.

    >>> row_error(torch.tensor([[0.5, 0.25], [0.5, 0.75]]))
    tensor(0.2500)
    """
    with torch.no_grad():
        return (plan.sum(-1) - (1.0 if row_marginal is None else row_marginal)).abs().amax()


def select_positions(
    student_logits: Float[Tensor, "*positions classes"],
    teacher_logits: Float[Tensor, "*positions classes"],
    labels: Int[Tensor, "*positions"],
    *,
    ignore_index: int = -100,
    max_positions: int | None = 512,
    allow_none: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "selected classes"], Float[Tensor, "selected classes"]]:
    """Gather the logits of a sequence model at its labelled positions, for losses that couple samples.

    The same positions are taken on both sides, in their order; of more than ``max_positions`` a uniform sample without
    replacement. The labels say only which positions count and must already stand where their logits do, which
    :func:`stillhouse.models.targets` sees to.

    Args:
        student_logits: logits, typically (batch, length, vocabulary).
        teacher_logits: the teacher's, of the same shape.
        labels: the label of each position.
        ignore_index: label of the positions to leave out.
        max_positions: the most positions to keep, since the costs grow with their square; ``None`` keeps all.
        allow_none: whether nothing may be labelled; then nothing is selected.
        generator: draws the sample; the global generator of the labels' device when not given.

    Returns:
        The selected logits of student and teacher, in their own precision; gradients flow back to both.

    Raises:
        UserError: shapes do not match, ``max_positions`` is below 1, or no position is labelled and ``allow_none`` is
            False.

    >>> logits = torch.arange(12.0).view(1, 4, 3)
    >>> student, teacher = select_positions(logits, -logits, torch.tensor([[-100, 5, -100, 7]]))
    >>> student
    tensor([[ 3.,  4.,  5.],
            [ 9., 10., 11.]])
    """
    where = "select_positions"
    _same_classes(where, "student_logits", student_logits, "teacher_logits", teacher_logits)
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if logits.shape[:-1] != labels.shape:
            raise UserError(
                f"{where}: {name} has the positions {tuple(logits.shape[:-1])}, but labels has {tuple(labels.shape)}."
            )
    if max_positions is not None and max_positions < 1:
        raise UserError(f"{where}: max_positions is at least 1, not {max_positions}.")
    chosen = (labels != ignore_index).flatten().nonzero().squeeze(1)
    if len(chosen) == 0 and not allow_none:
        raise UserError(
            f"{where}: labels has 0 valid positions of {labels.numel()} (all are ignore_index = {ignore_index}), but "
            "at least 1 is needed."
        )
    if max_positions is not None and len(chosen) > max_positions:
        drawn = torch.randperm(len(chosen), generator=generator, device=chosen.device)[:max_positions]
        chosen = chosen[drawn.sort().values]
    at = torch.unravel_index(chosen, labels.shape)
    return student_logits[at], teacher_logits[at]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _same_classes(where: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise UserError(
            f"{where}: {first} has {a.shape[-1]} classes but {second} has {b.shape[-1]}; crop or map both to one "
            "output space."
        )


def _check_scaling(where: str, epsilon: float, num_iterations: int) -> None:
    if not 0 < epsilon < math.inf:
        raise UserError(f"{where}: epsilon is above 0, not {epsilon}.")
    if num_iterations < 1:
        raise UserError(f"{where}: num_iterations is at least 1, not {num_iterations}.")


def _marginals(cost: Tensor, row_marginal: Tensor | None, column_marginal: Tensor | None) -> tuple[Tensor, Tensor]:
    num_rows, num_columns = cost.shape
    for name, marginal, size in (
        ("row_marginal", row_marginal, num_rows),
        ("column_marginal", column_marginal, num_columns),
    ):
        if marginal is None:
            continue
        if marginal.shape != (size,):
            raise UserError(f"sinkhorn: {name} has the shape {tuple(marginal.shape)}, but the cost needs ({size},).")
        if marginal.requires_grad:
            raise UserError(f"sinkhorn: {name} is a constant and gets no gradient; pass {name}.detach().")
        if marginal.device.type == "cpu" and not bool((marginal > 0).all()):
            raise UserError(
                f"sinkhorn: {name} is above 0 everywhere, but its smallest value is {float(marginal.min())}."
            )
    rows = cost.new_ones(num_rows) if row_marginal is None else row_marginal.to(cost)
    if column_marginal is not None:
        columns = column_marginal.to(cost)
        if row_marginal is None:
            rows = rows * (columns.sum() / num_rows)
    elif row_marginal is None:
        columns = cost.new_full((num_columns,), num_rows / num_columns)
    else:
        columns = rows.sum().expand(num_columns) / num_columns
    given = row_marginal is not None and column_marginal is not None
    if given and cost.device.type == "cpu":
        totals = float(rows.sum()), float(columns.sum())
        if not math.isclose(*totals, rel_tol=1e-4):
            raise UserError(
                f"sinkhorn: row_marginal sums to {totals[0]:g} and column_marginal to {totals[1]:g}; make them equal."
            )
    return rows, columns
