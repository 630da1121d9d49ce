"""Fitting one stage: the training loop, its guards, its evaluations, its checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stillhouse.data import Batch
from stillhouse.engine.checkpoint import Checkpoints
from stillhouse.engine.health import Streaks, judge_lines, judge_terms
from stillhouse.engine.optim import Ramp, weight_at
from stillhouse.engine.projection import Projection, project
from stillhouse.engine.records import Recorder
from stillhouse.engine.result import save_png
from stillhouse.engine.seeding import derive, forked_generators
from stillhouse.engine.shares import GradientShares
from stillhouse.engine.stage import Evaluation, Held, Losses, Modules, Skip, Stage, Trained, Update, resolve
from stillhouse.errors import NonFiniteError, RunError, UserError, nearest
from stillhouse.models import fingerprint

if TYPE_CHECKING:
    from stillhouse.data import Batches
    from stillhouse.engine.run import Run

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Interrupted(RunError):
    """The user asked to stop; a checkpoint was written."""

    exit_code = 130


class Fit:
    """The training of one stage within a run.

    Args:
        stage: what to train.
        run: the run it belongs to.
        checkpoints: where its state goes.
    """

    def __init__(self, stage: Stage, run: Run, checkpoints: Checkpoints) -> None:
        self.stage, self.run, self.checkpoints = stage, run, checkpoints
        device = run.world.device
        self.device = device
        self.modules = Modules({n: m.module if isinstance(m, Held) else m for n, m in stage.modules.items()})
        self.state_names = [n for n, m in stage.modules.items() if not isinstance(m, Held)]
        for module in self.modules.values():
            module.to(device)
        # A module that was drawn unseeded, or loaded from another file, is what the main process has.
        run.world.align(_once(t for m in self.modules.values() for t in (*m.parameters(), *m.buffers())))
        self.parts: list[tuple[str, Any]] = [
            (n, self.modules[n]) for n in self.state_names if hasattr(self.modules[n], "after_step")
        ]
        self.per_epoch = max(1, stage.batches.per_epoch(run.world.size) // stage.accumulate) if stage.batches else 1
        self.turns = [Turn(update, stage, self) for update in stage.updates]
        trained = {id(p) for turn in self.turns for p in turn.parameters}
        self.unmoved = [p for n in self.state_names for p in self.modules[n].parameters() if id(p) not in trained]
        self.streams = Streams(stage, run)
        self.averages = {n: Average(self.modules[n], decay) for n, decay in stage.ema.items()}
        self.recorder = Recorder(stage, run.directory.path / "records" / stage.name, run.world)
        # By owner and name: a module may put another tensor under a buffer's name.
        self.owners = [
            (sub._buffers, name)
            for sub in {id(sub): sub for n in self.state_names for sub in self.modules[n].modules()}.values()
            for name, buffer in sub._buffers.items()
            if buffer is not None
        ]
        self.snapshots: list[list[Tensor]] = [[], []]
        self.prints: dict[str, str] = {}
        self.best: dict[str, Any] | None = None
        self.metrics: dict[str, float] = {}
        self.streaks = Streaks()
        self.step = 0
        self.stopped_early = False
        precision = run.settings.precision
        self.autocast: Callable[[], AbstractContextManager[Any]] = (
            nullcontext if precision == "float32" else lambda: torch.autocast(device.type, DTYPES[precision])
        )

    def train(self, end: dict[str, Any] | None) -> Trained:
        """Load the end state, or train from the newest checkpoint (or from the start) to the end."""
        with self._held():
            self.prints = self._fingerprints()
            if end is None:
                self._train()
                self._end()
            else:
                self._load(end)
            self.run.offset = end["offset"] if end else self.run.directory.offset()
            self.recorder.close()
            self.streams.close()
        return Trained(
            name=self.stage.name,
            steps=self.step,
            metrics=self.metrics,
            best=self.best["metrics"] if self.best else self.metrics,
            kept=self.best["metrics"] if self.best and self.stage.keep == "best" else self.metrics,
            ema={name: average.shadow for name, average in self.averages.items()},
            records=self.recorder.read(self.step),
            stopped_early=self.stopped_early,
        )

    def _train(self) -> None:
        stage, run, settings = self.stage, self.run, self.run.settings
        checkpoint = self.checkpoints.latest()
        if checkpoint is not None:
            self._load(checkpoint)
        run.directory.rewind(checkpoint["offset"] if checkpoint else run.offset)
        run.listener.stage(f"{run.within}{stage.name}", stage.steps, self.step)
        log_every, every_steps = settings.log_every, settings.checkpoint_every
        saved_at = time.monotonic()
        evaluate_every, show_every = stage.evaluate.every if stage.evaluate else 0, stage.shown_every
        if self.step == 0:
            self.recorder.take(0, self.modules)
        while self.step < stage.steps and not self.stopped_early:
            self._step(self.step)
            self.step = step = self.step + 1
            last = step == stage.steps
            if last or step % log_every == 0:
                self._log(step)
            run.listener.step(step)
            self.recorder.take(step, self.modules)
            if stage.evaluate and (last or step % evaluate_every == 0):
                self._evaluate(stage.evaluate, step)
                last |= self.stopped_early
            if stage.show and (last or step % show_every == 0):
                self._show(step)
            stop, late = run.signals.stop, time.monotonic() - saved_at > 60 * settings.checkpoint_minutes
            if run.world.size > 1:
                # Processes must agree, and agreeing costs a message: asked only where they meet anyway.
                meeting = step % log_every == 0
                stop, late = meeting and run.world.any(stop), meeting and run.world.any(late)
            if not last and (stop or late or (every_steps and step % every_steps == 0)):
                self._save()
                saved_at = time.monotonic()
            if stop and not last:
                raise Interrupted(f"stopped in stage {stage.name!r} at step {step}.")

    def _end(self) -> None:
        """Put the weights to keep into the modules and store the end state."""
        self._check_late()
        if self.stage.keep == "best":
            assert self.best is not None
            self._load_modules(self.best.pop("modules"))
        elif self.stage.keep == "ema":
            for average in self.averages.values():
                average.apply()
        for name, before in self._fingerprints().items():
            if before != self.prints[name]:
                raise RunError(
                    f"stage {self.stage.name!r}: the module {name!r} is held frozen and was changed during the stage; "
                    "hold what moves as a module of the stage."
                )
        state = self._state()
        if self.run.world.is_main:
            self.run.directory.flush()
            self.checkpoints.finish(state)
        self.run.world.barrier()

    def _fingerprints(self) -> dict[str, str]:
        frozen = {n: m.module for n, m in self.stage.modules.items() if isinstance(m, Held) and m.mode != "scratch"}
        return {name: fingerprint(module) for name, module in frozen.items()}

    def _step(self, step: int) -> None:
        run, stage = self.run, self.stage
        run.enter(stage.name, step, stage.steps, self.per_epoch)
        if self.owners:
            self.snapshots[step % 2] = _copied(self._buffers(), self.snapshots[step % 2])
        self._check_late()
        batches: list[Batch] | None = None
        for turn in self.turns:
            update = turn.update
            if isinstance(update.every, int):
                fires = step % update.every == 0
            else:
                run.place("every", update.name)
                fires = update.every(run)
            if not fires:
                continue
            for time_ in range(update.times):
                if update.batches is not None:
                    mine = self._fetch(update.name, step, str(time_), prepared=False)
                elif batches is None or time_ > 0:
                    again = f"{update.name} {time_}" if time_ else ""
                    mine = batches = self._fetch("", step, again, prepared=True)
                else:
                    mine = batches
                turn.fire(mine, step, time_)
        for name, part in self.parts:
            run.place("after", name)
            part.after_step(run)
        if self.owners and run.world.size > 1:
            # Each process saw other samples; its batch norm goes on with what the main process has, as it is stored.
            run.world.align(_once(self._buffers()))
        for average in self.averages.values():
            average.update()

    def _fetch(self, stream: str, step: int, again: str, *, prepared: bool) -> list[Batch]:
        run, stage = self.run, self.stage
        batches = []
        for micro in range(stage.accumulate):
            if stream in self.streams.drawing:
                run.place("fetch", stream, micro, again)
            batch = self.streams.next(stream)
            if prepared and stage.prepare is not None:
                run.place("prepare", stream, micro, again)
                with self.autocast():
                    replaced = stage.prepare(self.modules, batch, run)
                batch = batch if replaced is None else replaced
            batches.append(batch)
        return batches

    def _buffers(self) -> list[Tensor]:
        return [buffer for owner, name in self.owners if (buffer := owner[name]) is not None]

    def _check_late(self) -> None:
        for turn in self.turns:
            turn.check_late()

    def fail(self, turn: Turn, term: str, step: int) -> None:
        """Stop for a non-finite term: nothing was stepped, and buffers that the forward moved are put back."""
        for buffer, saved in zip(self._buffers(), self.snapshots[step % 2], strict=True):
            buffer.copy_(saved)
        kept = self.checkpoints.directory if self.checkpoints.any() else None
        batches = turn.update.batches or self.stage.batches
        found = batches.split.not_finite() if batches is not None else None
        why = (
            f" (and so is {found[0]!r} of sample {found[1]} of the split {batches.split.name!r})"
            if found and batches
            else ""
        )
        raise NonFiniteError(
            f"stage {self.stage.name!r}, step {step}: the {term!r} term of update {turn.update.name!r} is NaN or infinite{why}; "
            + ("weights were left as they were" + (f" and the last good checkpoint is in {kept}." if kept else ".")),
            stage=self.stage.name,
            term=term,
            step=step,
        )

    def _log(self, step: int) -> None:
        self._check_late()
        row: dict[str, float | int | str] = {"stage": self.stage.name, "step": step}
        said: list[str] = []
        for turn in self.turns:
            terms, shares = turn.flush()
            row.update(terms)
            said += judge_terms(turn.update.name, shares, self.streaks)
        self.run.log(row)
        self._warn(said, step)

    def _warn(self, sentences: Iterable[str], step: int) -> None:
        """Tell whoever listens, and the log, from which the report takes it."""
        for sentence in sentences:
            self.run.directory.log({"stage": self.stage.name, "step": step, "warning": sentence})
            self.run.listener.say(f"stage {self.run.within}{self.stage.name}, step {step:,}: {sentence}")

    @contextmanager
    def _looking(self, *place: int | str) -> Iterator[None]:
        """Modules as they would be kept, in eval mode; nothing within leaves a trace in the training."""
        averaged = self._averaged() if self.stage.keep == "ema" else nullcontext()
        seed = derive(self.run.seed, self.stage.name, *place)
        with measuring(*self.modules.values()), forked_generators(seed, self.device), averaged:
            yield

    def _measure(self, evaluation: Evaluation, step: int) -> dict[str, float]:
        with self._looking(step, "evaluate"):
            measured = {k: float(v) for k, v in evaluation.measure(self.modules).items()}
        return self.run.world.from_main(measured)

    def _show(self, step: int) -> None:
        """Draw what there is to see; the same draws at each step, so that pictures differ by the training alone."""
        pictures = self._pictures()
        if self.run.world.is_main:
            place = self.run.directory.path / "samples" / self.stage.name
            place.mkdir(parents=True, exist_ok=True)
            for name, picture in pictures.items():
                save_png(picture, place / f"{step:09d}-{name}.png")

    def _pictures(self) -> Mapping[str, Tensor]:
        assert self.stage.show is not None
        self._check_late()
        with self._looking("show"):
            return self.stage.show(self.modules, self.run)

    def _evaluate(self, evaluation: Evaluation, step: int) -> None:
        self._check_late()
        measured = self._measure(evaluation, step)
        self.metrics = measured
        held_against = {
            f"{evaluation.monitor}/line/{name}": at
            for name, line in evaluation.lines.items()
            if (at := line.at(step)) is not None
        }
        self.run.log({"stage": self.stage.name, "step": step, **measured, **held_against})
        if evaluation.monitor not in measured:
            raise UserError(
                f"stage {self.stage.name!r}: the evaluation gives {sorted(measured)}, not the monitored {evaluation.monitor!r}."
            )
        value = measured[evaluation.monitor]
        sign = 1 if evaluation.mode == "max" else -1
        # Nothing compares as better than NaN, so a first NaN would stay the best for ever.
        if self.best is None or math.isnan(self.best["value"]) or sign * value > sign * self.best["value"]:
            modules = self._module_state(clone=True) if self.stage.keep == "best" else {}
            self.best = {"value": value, "step": step, "stale": 0, "metrics": measured, "modules": modules}
        else:
            self.best["stale"] += 1
            if evaluation.patience is not None and self.best["stale"] >= evaluation.patience:
                self.stopped_early = True
        lines = judge_lines(evaluation.lines, evaluation.monitor, value, step, evaluation.mode, self.streaks)
        self._warn(lines, step)
        self.run.listener.measured(self.stage.name, step, evaluation.monitor, value, evaluation.mode)

    def _module_state(self, *, clone: bool = False) -> dict[str, dict[str, Tensor]]:
        state = {n: dict(self.modules[n].state_dict()) for n in self.state_names}
        return {n: {k: v.clone() for k, v in s.items()} for n, s in state.items()} if clone else state

    def _load_modules(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name in self.state_names:
            self.modules[name].load_state_dict(state[name])

    def _state(self) -> dict[str, Any]:
        """What a resumed stage needs; all processes must ask for it together."""
        self.recorder.flush()
        return {
            "step": self.step,
            "modules": self._module_state(),
            "turns": {turn.update.name: turn.state() for turn in self.turns},
            "streams": self.streams.state(),
            "averages": {name: average.shadow for name, average in self.averages.items()},
            "best": self.best,
            "metrics": self.metrics,
            "streaks": self.streaks.state(),
            "stopped_early": self.stopped_early,
            "offset": self.run.directory.offset(),
            "frozen": self.prints,
        }

    def _load(self, state: dict[str, Any]) -> None:
        for name, before in state["frozen"].items():
            if self.prints[name] != before:
                raise UserError(
                    f"stage {self.stage.name!r}: the frozen module {name!r} holds other weights than when this run was "
                    "started; resume with the same ones, or start a new run."
                )
        self.step = state["step"]
        self._load_modules(state["modules"])
        for turn in self.turns:
            turn.load(state["turns"][turn.update.name])
        self.streams.load(state["streams"])
        for name, average in self.averages.items():
            average.load(state["averages"][name])
        self.best, self.metrics = state["best"], state["metrics"]
        if "streaks" in state:
            self.streaks.load(state["streaks"])
        self.stopped_early = state["stopped_early"]

    def _save(self) -> None:
        self._check_late()
        state = self._state()
        if self.run.world.is_main:
            self.run.directory.flush()
            self.checkpoints.save(self.step, state)
            self.run.charge()
        self.run.world.barrier()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones."""
        saved = self._module_state(clone=True)
        for average in self.averages.values():
            average.apply()
        try:
            yield
        finally:
            self._load_modules(saved)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Modes and gradient flags of the stage, put back afterwards; frozen modules run without a graph."""
        modes = [(sub, sub.training) for module in self.modules.values() for sub in module.modules()]
        flags = [(p, p.requires_grad) for module in self.modules.values() for p in module.parameters()]
        hooks = []
        for name, held in self.stage.modules.items():
            module = self.modules[name]
            if isinstance(held, Held):
                module.eval().requires_grad_(False)
                if held.mode == "frozen":
                    hooks += _without_graph(module)
                elif held.mode == "scratch":
                    module.train()
            else:
                module.train()
        for parameter in self.unmoved:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for sub, mode in modes:
                sub.training = mode
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
                parameter.grad = None


class Turn:
    """One update's machinery: its parameters, optimisers, scaler, sums for the log."""

    def __init__(self, update: Update, stage: Stage, fit: Fit) -> None:
        self.update, self.stage, self.fit = update, stage, fit
        self.where = where = f"stage {stage.name!r}, update {update.name!r}"
        self.groups: list[tuple[str, Any, list[nn.Parameter], torch.optim.Optimizer]] = []
        self.paths: list[str] = []
        self.parameters: list[nn.Parameter] = []
        matched: set[int] = set()
        for pattern, spec in update.trains.items():
            try:
                found = resolve(pattern, stage.modules)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            for path, parameter in found:
                if id(parameter) in matched:
                    raise UserError(
                        f"{where}: {path} is matched by two patterns in 'trains'; let one of them leave it out."
                    )
                matched.add(id(parameter))
                self.paths.append(path)
                self.parameters.append(parameter)
            parameters = [parameter for _, parameter in found]
            name = pattern if isinstance(pattern, str) else "+".join(pattern)
            self.groups.append((name, spec, parameters, spec.build(parameters)))
        self.firings = 0
        every = update.every if isinstance(update.every, int) else 1
        self.total = -(-stage.steps // every) * update.times
        self.per_epoch = max(1, fit.per_epoch * update.times // every)
        for _, spec, *_ in self.groups:
            spec.covers(self.total, self.per_epoch)
        self.weights: dict[str, float | Ramp] = dict(update.weights or {})
        fp16 = fit.run.settings.precision == "fp16"
        self.scaler = torch.amp.GradScaler(fit.device.type) if fp16 else None
        for name in update.eval:
            if name not in fit.modules:
                raise UserError(f"{where}: eval names {name!r}, which is not there; {nearest(name, fit.modules)}.")
        self.evaluating = [fit.modules[name] for name in update.eval]
        self.seen: list[tuple[str, Tensor, float]] = []
        self.dropped = False
        self.shares = GradientShares(self.parameters, stage.steps) if fit.run.settings.gradient_shares else None
        # Terms with their graphs, kept only until their sample is taken.
        self.terms: list[tuple[str, Tensor]] = []
        self.sampling = False
        self.found, self.one = torch.zeros((), device=fit.device), torch.ones((), device=fit.device)
        self.sums: dict[str, Tensor] = {}
        self.scales: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.reached = update.sparse
        self.immediate = (
            fit.device.type == "cpu"
            or fit.run.world.size > 1
            or not all(group.defaults.get("fused") for *_, group in self.groups)
        )
        self.late: tuple[int, list[tuple[str, Tensor, float]], Tensor] | None = None

    def fire(self, batches: Sequence[Batch], step: int, time_: int) -> None:
        """One firing: losses and gradients over the micro-batches, then one step of each optimiser."""
        self.check_late()
        for parameter in self.parameters:
            parameter.grad = None
        self.seen, self.dropped = [], False
        modes = [(sub, sub.training) for module in self.evaluating for sub in module.modules()]
        for module in self.evaluating:
            module.eval()
        try:
            total = self._differentiate(batches, step, time_)
        finally:
            for sub, mode in modes:
                sub.training = mode
        if self.fit.run.world.size > 1:
            self._agree(total, step)
        if total is not None:
            if not (self.reached or self.dropped):
                self._check_reached()
            bad = None if self.immediate else (~torch.isfinite(total)).float()
            self._optimise(step, bad)
            if bad is not None:
                self.late = (step, self.seen, bad)
            self._sum(len(batches))
        self.firings += 1

    def _differentiate(self, batches: Sequence[Batch], step: int, time_: int) -> Tensor | None:
        """Gradients of the loss, and its value; None when nothing shall move."""
        run, fit = self.fit.run, self.fit
        total: Tensor | None = None
        due = self.shares is not None and self.shares.due(step)
        for micro, batch in enumerate(batches):
            self.sampling, self.terms = due and micro == 0, []
            run.place("loss", self.update.name, micro, time_)
            with fit.autocast():
                losses = self.update.loss(fit.modules, batch, run)
                whole = self._weigh(losses) if isinstance(losses, Mapping) else None
            if isinstance(losses, Skip):
                return None
            for loss in (whole,) if isinstance(losses, Mapping) else self._pieces(losses):
                if loss is None:
                    continue
                terms = self.terms
                if self.sampling and (len(self.terms) > 1 or not isinstance(losses, Mapping)):
                    self._sample(whole=isinstance(losses, Mapping))
                if len(batches) > 1:
                    loss = loss / len(batches)
                total = loss.detach() if total is None else total + loss.detach()
                if self.immediate and run.world.size == 1 and not math.isfinite(total.item()):
                    self._blame(step)
                if loss.requires_grad and self.update.projection is not None:
                    self._project(self.update.projection, terms)
                elif loss.requires_grad:
                    scaled = loss if self.scaler is None else self.scaler.scale(loss)
                    torch.autograd.backward(scaled, inputs=self.parameters)
        self.sampling, self.terms = False, []
        if due and self.shares is not None:
            self.shares.taken(step)
        if total is None and not any(isinstance(weight, Ramp) for weight in self.weights.values()):
            raise UserError(f"{self.where}: every term has weight 0, so nothing is trained.")
        return total

    def _sample(self, *, whole: bool) -> None:
        assert self.shares is not None
        terms, self.terms = self.terms, []
        scale = (lambda loss: loss) if self.scaler is None else self.scaler.scale
        self.shares.measure(terms, self.fit.run, self.fit.owners, scale, whole=whole)

    def _project(self, projection: Projection, terms: Sequence[tuple[str, Tensor]]) -> None:
        scale = (lambda loss: loss) if self.scaler is None else self.scaler.scale
        # The scope's patterns are one, so that "!..." takes away from those before it.
        patterns = (projection.scope,) if projection.scope else tuple(self.update.trains)
        scope = {id(p) for pattern in patterns for _, p in resolve(pattern, self.stage.modules)}
        weighted = {name: scale(value) for name, value in terms}
        project(projection, scope, weighted, self.parameters, self.fit.run.world.average_gradients)

    def _pieces(self, losses: Iterator[Losses]) -> Iterator[Tensor | None]:
        """The weighted losses of a generator, one after the other, computed under the run's precision."""
        if not isinstance(losses, Iterator):
            raise UserError(
                f"{self.where}: its loss returns a {type(losses).__name__}; return named terms, such as {{'ce': ...}}."
            )
        while True:
            with self.fit.autocast():
                piece = next(losses, None)
                if piece is None:
                    return
                weighed = self._weigh(piece)
            yield weighed

    def _weigh(self, losses: Losses) -> Tensor | None:
        """The weighted sum of the terms whose weight is not 0."""
        total: Tensor | None = None
        run = self.fit.run
        for name, term in losses.items():
            known = self.weights.get(name)
            if known is None:
                fields = None if self.update.weights is not None else self.fit.run.method
                known = self.weights[name] = getattr(fields, f"weight_{name}", 1.0)
            weight = known if isinstance(known, float) else weight_at(known, run.step, run.steps, run.per_epoch)
            if weight == 0:
                self.dropped = True
                continue
            value: Tensor = term if isinstance(term, Tensor) else term()
            if value.dim():
                raise UserError(
                    f"{self.where}: the term {name!r} has the shape {list(value.shape)}; a term is one number, "
                    "so take its mean."
                )
            weighted = value if weight == 1 else value * weight
            total = weighted if total is None else total + weighted
            if self.sampling or self.update.projection is not None:
                self.terms.append((name, weighted))
            self.seen.append((name, value.detach().float(), weight))
        return total

    def _agree(self, total: Tensor | None, step: int) -> None:
        """Bring the processes together: skip, fail or average alike, in all of them."""
        world = self.fit.run.world
        bad = total is not None and not math.isfinite(total.item())
        flags = [total is None, total is not None, bad, *(p.grad is not None for p in self.parameters)]
        still, moves, bad, *reached = world.any_of(flags)
        if still and moves:
            raise UserError(
                f"{self.where}: its loss skips in some processes and not in others; decide by run.mean or run.gather."
            )
        if bad:
            self._blame(step)
        # What no process reached has no gradient, as in a single process, and is not stepped.
        world.average_gradients([p for p, one in zip(self.parameters, reached, strict=True) if one])

    def _sum(self, micro_batches: int) -> None:
        """Add the terms of a firing to what the next row of the log will say."""
        for name, value, weight in self.seen:
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.scales[name] = weight
        for name in {name: None for name, _, _ in self.seen}:
            self.counts[name] = self.counts.get(name, 0) + micro_batches

    def _optimise(self, step: int, bad: Tensor | None) -> None:
        moving = []
        for _, spec, parameters, optimizer in self.groups:
            if not spec.constant:
                lr = spec.lr_at(self.firings, self.total, self.per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = lr
            gradients = [p.grad for p in parameters if p.grad is not None]
            if not gradients:
                continue
            moving.append(optimizer)
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            else:
                found = self.found if bad is None else bad
                _flag_non_finite(gradients, found, self.one)
                if bad is None and found.item():
                    self.fit.fail(self, "gradient", step)
            if spec.clip_value is not None:
                torch._foreach_clamp_min_(gradients, -spec.clip_value)
                torch._foreach_clamp_max_(gradients, spec.clip_value)
            if spec.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, spec.clip_norm, foreach=True)
        for optimizer in moving:
            if self.scaler is not None:
                self.scaler.step(optimizer)
            else:
                if bad is not None:
                    # Fused optimisers read this flag on the device and leave weights and state alone when it is set.
                    optimizer.found_inf = bad  # type: ignore[attr-defined]
                optimizer.step()
        if self.scaler is not None and moving:
            self.scaler.update()

    def _blame(self, step: int) -> None:
        term = next((n for n, v, _ in self.seen if not math.isfinite(float(v))), None)
        self.fit.fail(self, self.fit.run.world.first(term) or "total", step)

    def check_late(self) -> None:
        """Read the flag of the firing before: by now the device has it, so nobody waits."""
        if self.late is None:
            return
        late_step, seen, bad = self.late
        self.late = None
        if bool(bad):
            self.seen = seen
            term = next((n for n, v, _ in seen if not math.isfinite(float(v))), "gradient")
            self.fit.fail(self, term, late_step)

    def _check_reached(self) -> None:
        missed = [path for path, p in zip(self.paths, self.parameters, strict=True) if p.grad is None]
        if missed:
            raise UserError(
                f"{self.where}: no loss term reaches {missed[0]}"
                + (f" and {len(missed) - 1} more trained parameters" if len(missed) > 1 else "")
                + "; leave it out of 'trains', or mark the update 'sparse'."
            )
        self.reached = True

    def flush(self) -> tuple[dict[str, float], dict[str, float]]:
        """Means of the terms since the last log, their weighted scales and shares, the learning rates; and the shares."""
        row: dict[str, float] = {}
        name = self.update.name
        if self.sums:
            sums = self.fit.run.world.average(torch.stack(list(self.sums.values())))
            for term, total in zip(self.sums, sums.tolist(), strict=True):
                row[f"{name}/{term}"] = mean = total / self.counts[term]
                if self.scales[term] != 1:
                    row[f"{name}/{term}/scale"] = mean * self.scales[term]
        shares = self.shares.flush(self.fit.run.world.average) if self.shares is not None else {}
        row |= {f"{name}/{term}/gradient_share": share for term, share in shares.items()}
        for pattern, spec, _, optimizer in self.groups:
            if not spec.constant:
                row[f"{name}/lr/{pattern}"] = optimizer.param_groups[0]["lr"]
        self.sums, self.scales, self.counts = {}, {}, {}
        return row, shares

    def state(self) -> dict[str, Any]:
        """Everything of this update that a resumed run needs; the sums of a term are those of all processes, by rank."""
        world = self.fit.run.world
        sums = world.gather(torch.stack(list(self.sums.values()))[None]).T if self.sums else ()
        return {
            "firings": self.firings,
            "optimizers": {name: optimizer.state_dict() for name, *_, optimizer in self.groups},
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "sums": dict(zip(self.sums, sums, strict=True)),
            "scales": self.scales,
            "counts": self.counts,
            "reached": self.reached,
            "shares": self.shares.state(world.gather) if self.shares is not None else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state` gave."""
        self.firings, self.reached = state["firings"], state["reached"]
        self.scales, self.counts = state["scales"], state["counts"]
        rank, size = self.fit.run.world.rank, self.fit.run.world.size

        def own(sums: Tensor) -> Tensor:
            # Where other processes took over, each has the mean, which is what the log averages to.
            return (sums[rank] if len(sums) == size else sums.mean()).to(self.fit.device)

        self.sums = {name: own(sums) for name, sums in state["sums"].items()}
        if self.shares is not None and state.get("shares") is not None:
            self.shares.load(state["shares"], own)
        for name, *_, optimizer in self.groups:
            optimizer.load_state_dict(state["optimizers"][name])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def reset(self, parameters: Sequence[Tensor]) -> None:
        """Forget what the optimisers remember of ``parameters``."""
        for *_, optimizer in self.groups:
            for parameter in parameters:
                optimizer.state.pop(parameter, None)


class Streams:
    """The stage's batches and the updates' own, opened under seeds of their names."""

    def __init__(self, stage: Stage, run: Run) -> None:
        sources: dict[str, Batches] = {}
        if stage.batches is not None:
            sources[""] = stage.batches
        for update in stage.updates:
            if update.batches is not None:
                sources[update.name] = update.batches
        world = run.world
        # Seeding has a cost, and a batch that is only looked up needs none.
        self.drawing = {name for name, source in sources.items() if source.draws}
        self.streams = {
            name: source.open(
                derive(run.seed, stage.name, name, "order"), rank=world.rank, world=world.size, device=world.device
            )
            for name, source in sources.items()
        }

    def next(self, name: str) -> Batch:
        """The next batch of a stream; an empty one where the stage has none."""
        return next(self.streams[name]) if name in self.streams else Batch()

    def close(self) -> None:
        """End the processes that read, where there are any."""
        for stream in self.streams.values():
            stream.close()

    def state(self) -> dict[str, Any]:
        """Positions of all streams."""
        return {name: stream.state() for name, stream in self.streams.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state` gave."""
        for name, stream in self.streams.items():
            stream.restore(state[name])


class Average:
    """Exponential moving average of a module's floating tensors; other tensors are copied."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.shadow = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    def update(self) -> None:
        """Move towards the module's weights."""
        current = self.module.state_dict()
        floating = [n for n, t in current.items() if t.is_floating_point()]
        torch._foreach_lerp_([self.shadow[n] for n in floating], [current[n] for n in floating], 1 - self.decay)
        for name, tensor in current.items():
            if not tensor.is_floating_point():
                self.shadow[name].copy_(tensor)

    def apply(self) -> None:
        """Write the average into the module."""
        self.module.load_state_dict(self.shadow)

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Take over a stored average."""
        for name, tensor in shadow.items():
            self.shadow[name].copy_(tensor)


def _without_graph(module: nn.Module) -> list[Any]:
    """Hooks that run a module's forward without building a graph."""
    grad_modes: list[bool] = []

    def enter(*_: Any) -> None:
        grad_modes.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)

    def leave(*_: Any) -> None:
        torch.set_grad_enabled(grad_modes.pop())

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


@contextmanager
def measuring(*modules: nn.Module) -> Iterator[None]:
    """Modules in eval mode, without gradients, for a block; the mode of every sub-module is put back afterwards."""
    modes = [(sub, sub.training) for module in modules for sub in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for sub, mode in modes:
            sub.training = mode


def _flag_non_finite(gradients: list[Tensor], found: Tensor, one: Tensor) -> None:
    """Set ``found`` to 1 if an element is NaN or infinite, on its device: what gradient scalers use, at a scale of 1."""
    dtypes = {gradient.dtype: None for gradient in gradients}
    for dtype in dtypes:
        same = gradients if len(dtypes) == 1 else [gradient for gradient in gradients if gradient.dtype == dtype]
        if dtype.is_complex:
            same = [torch.view_as_real(gradient) for gradient in same]
        torch._amp_foreach_non_finite_check_and_unscale_(same, found, one)


def _once(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor once, in order, also where modules share it."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def _copied(tensors: list[Tensor], into: list[Tensor]) -> list[Tensor]:
    """Copies of ``tensors``, in the memory of ``into`` once there is one."""
    if not into:
        return [tensor.clone() for tensor in tensors]
    torch._foreach_copy_(into, tensors)
    return into
