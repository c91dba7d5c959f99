"""Training, from top to bottom: epochs of updates, a validation now and then, checkpoints."""

import copy
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3

from ..data.batch import Batch
from ..errors import InputError, cause_of
from ..figures import draw_curves
from . import checkpoint, distributed, parallel
from .budgets import Budgets
from .device import pick_precision
from .evaluate import score
from .freeze import freeze, train_mode
from .job import Figures, Job, Outcome
from .logs import RunLog, progress, read_log
from .optim import make_optimizer, make_schedule, scaled_lr
from .preemption import EXIT_CODE, Preemption
from .run import EpochSoFar, Run, Update
from .settings import LoopConfig
from .uploads import Uploads

UNREADABLE_COLUMNS = ("epoch", "path", "cause")  # columns of unreadable.csv
TIMED = 8  # updates, after the first, that the run's length is told from
SCALINGS = 16  # halvings until fp16's first scale of the loss, 65536, is 1


def fit(job: Job, config: LoopConfig, *, output: Path, seed: int, resume: dict[str, Any] | None) -> Path:
    """Train; -> the checkpoint to score: `best.pt`, by the task's first figure in validation; `last.pt`
    where there was none.

    resume: contents of a checkpoint to continue from; emptied once they are in the model.
    """
    trainer = Trainer(job, config, output=output, seed=seed, resume=resume)
    trainer.train()
    return output / (checkpoint.LAST if trainer.run.best < 0 else checkpoint.BEST)


def start_run(job: Job, config: LoopConfig, *, updates_an_epoch: int, scale: float = 1.0) -> Run:
    """A run before its first update. scale: what learning rates are multiplied by.

    The order matters: averages are copied before the model is compiled, sharded or wrapped.
    """
    model, device = job.model, job.device
    freeze(model, config.freeze)
    precision = pick_precision(config.precision, device)
    sharded = config.parallel == "fsdp2" and distributed.world() > 1
    plain = copy.deepcopy(model).cpu() if sharded else None
    ema = None
    if config.ema is not None:
        one_by_one = bool(distributed.kept_buffers(model))  # buffers are not sharded, parameters may be
        ema = ModelEmaV3(model, decay=config.ema, use_warmup=config.ema_warmup, foreach=not one_by_one)
        if sharded:
            parallel.shard(ema.module, device)
    wrapped = parallel.wrap(model, config.parallel, device, compile=config.compile, precision=precision)
    optimizer = make_optimizer(
        model,
        lr=scale * config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        head_lr=config.head_lr,
    )
    schedule = make_schedule(
        optimizer,
        updates=config.epochs * updates_an_epoch,
        warmup_updates=round(config.warmup() * updates_an_epoch),
        warmup_lr=scale * config.warmup_lr,
        min_lr=scale * config.min_lr,
        kind=config.schedule,
        steps=[epoch * updates_an_epoch for epoch in config.steps],
    )
    return Run(wrapped, model, ema, optimizer, schedule, plain, device, precision, config.clip_grad)


class Trainer:
    """One run: the job, its state, and what is written as it goes.

    Every update seeds torch with (seed, update, rank), so a run's random state is its update counter.
    """

    def __init__(
        self, job: Job, config: LoopConfig, *, output: Path, seed: int, resume: dict[str, Any] | None
    ):
        self.job, self.config, self.output, self.seed = job, config, output, seed
        self.loader = job.train_loader
        per_update = config.batch_size * config.accumulate * distributed.world()
        updates_an_epoch = len(self.loader) // config.accumulate
        falling = None if config.budget_epochs is None else round(config.budget_epochs * updates_an_epoch)
        self.budgets = Budgets(job.model, config.budgets, seed=seed, falling_updates=falling)
        self.run = start_run(
            job,
            config,
            updates_an_epoch=updates_an_epoch,
            scale=per_update / config.lr_per,
        )
        if resume is not None:
            self.run.load(resume)
            self.run.so_far.rescale(config.accumulate, resume["config"]["train"]["accumulate"])
            resume.clear()  # or it would stay in memory for as long as the run lasts
        if distributed.is_main():
            if config.warmup() != config.warmup_epochs:
                print(
                    f"warning: train.warmup_epochs={config.warmup_epochs:g} is not below train.epochs="
                    f"{config.epochs}, the rate would never be reached: shortened to {config.warmup():g}",
                    file=sys.stderr,
                )
            print(
                f"learning rate {scaled_lr(config.lr, per_update, config.lr_per):.3g} = {config.lr:g} "
                f"(train.lr) x {per_update} videos an update ({config.batch_size} x {config.accumulate} "
                f"accumulated x {distributed.world()} ranks; repeated clips not counted) / "
                f"{config.lr_per} (train.lr_per), reached after "
                f"{round(config.warmup() * updates_an_epoch)} of {config.epochs * updates_an_epoch} updates"
            )
            if config.freeze is not None:
                counts = [(p.numel(), p.requires_grad) for p in job.model.parameters()]
                trained = sum(count for count, free in counts if free)
                every = sum(count for count, _ in counts)
                print(f"train.freeze={config.freeze}: {trained:,} of {every:,} parameters are trained")

    def train(self) -> None:
        run, config, val_loader = self.run, self.config, self.job.val_loader
        self.log = RunLog(self.output, epoch=run.epoch, update=run.update)
        self.first = run.update + 1
        with Preemption() as self.preemption, closing(self.log):
            while run.epoch < config.epochs:
                self._epoch()
                outcome, figures = None, {}
                due = (run.epoch + 1) % config.eval_every == 0 or run.epoch + 1 == config.epochs
                if val_loader is not None and due:
                    self._save()  # so that SIGTERM and failures of the validation cost the validation alone
                    outcome, figures = self._validate()
                best = self._close_epoch(outcome, figures)
                self._save(best, keep=bool(config.keep_every) and run.epoch % config.keep_every == 0)
        if distributed.is_main():
            draw_curves(read_log(self.log.path), self.output / "curves.png")
        distributed.barrier()

    def _epoch(self) -> None:
        """One pass over the training list, or what is left of it; its figures are in `run.so_far`.

        Raises SystemExit(143) after an update and its checkpoint, when SIGTERM came.
        """
        run, so_far, batches = self.run, self.run.so_far, len(self.loader)  # in whole updates
        parts = self.config.accumulate
        self.loader.sampler.epoch, self.loader.sampler.batches_done = run.epoch, so_far.batches
        uploads = Uploads(self.loader, self.job.device)
        train_mode(run.model)
        self.saved = ready = time.perf_counter()
        title = f"epoch {run.epoch + 1}/{self.config.epochs}"
        with progress(total=batches, initial=so_far.batches, desc=title, unit="batch") as bar:
            while so_far.batches < batches:
                with self.budgets.during(run.update):
                    update = run.make_update(
                        self.job.task,
                        self._counted(uploads),
                        parts,
                        seed=self.seed,
                        flags=self._flags,
                        prefetch=uploads.prefetch,
                    )
                bar.update(parts)
                so_far.waited, uploads.waited = so_far.waited + uploads.waited, 0.0
                so_far.seconds += time.perf_counter() - ready
                if not update.skipped:
                    so_far.loss += update.losses["loss"] * parts
                    so_far.counted += parts
                self._tell(update, bar)
                self._foretell(bar)
                self._obey(update, bar)
                ready = time.perf_counter()

    def _counted(self, uploads: Uploads) -> Iterator[Batch]:
        so_far = self.run.so_far
        for batch in uploads:
            so_far.failures |= dict(batch.failures)
            if batch.failed:  # by itself more than the list may have
                self._append_unreadable(so_far.failures.items())
                raise InputError(self._too_many(len(so_far.failures), batch.failures))
            so_far.batches += 1
            so_far.clips += len(batch.indices) * len(batch.clips[0]) * distributed.world()
            yield batch

    def _flags(self) -> tuple[float, float, float]:
        """Whether a checkpoint is due (the main process says so), whether to stop, videos unreadable."""
        minutes = (time.perf_counter() - self.saved) / 60
        every = self.config.checkpoint_minutes
        due = every is not None and minutes >= every and distributed.is_main()
        return due, self.preemption.asked, len(self.run.so_far.failures)

    def _tell(self, update: Update, bar) -> None:
        run, batches = self.run, len(self.loader)
        if update.skipped:
            header = ("epoch", "update", "rank", "loss", "index", "path")
            self.log.append("nonfinite.csv", header, self._record(update))
        if run.update % self.config.log_every == 0 or run.so_far.batches == batches:
            losses = dict.fromkeys(update.losses) if update.skipped else update.losses
            budget = self.budgets.at(run.update - 1)
            tokens = {} if budget is None else {"tokens": budget}
            at = round(run.epoch + run.so_far.batches / batches, 4)
            self.log.write("step", step=run.update, at=at, **losses, **tokens, lr=run.lr())
            bar.set_postfix_str(self._postfix(losses["loss"]), refresh=False)

    def _foretell(self, bar) -> None:
        """Early, and once: how long the run takes. The first update, which starts workers, is left out."""
        run = self.run
        if run.update == self.first:
            self.began = time.perf_counter()
        elif run.update == self.first + TIMED and distributed.is_main():
            seconds = (time.perf_counter() - self.began) / TIMED
            updates = self.config.epochs * (len(self.loader) // self.config.accumulate) - run.update
            minutes = max(round(updates * seconds / 60), 1)
            bar.write(
                f"{updates} updates left, {seconds:.2g} s each: about {minutes} minutes, validations apart"
            )

    def _record(self, update: Update) -> list[tuple]:
        """The videos of an update that was skipped, a row each, of all ranks."""
        run, rows = self.run, self.loader.dataset.rows
        here = [
            (run.epoch + 1, run.update, distributed.rank(), loss.item(), index, rows[index].path)
            for indices, loss in update.passes
            for index in indices.tolist()
        ]
        return distributed.to_main(here)

    def _obey(self, update: Update, bar) -> None:
        """What the ranks agreed on with an update: stop on too much trouble, save, end by SIGTERM."""
        run = self.run
        due, stop, unreadable = update.flags
        if unreadable > self.loader.dataset.max_unreadable * self._videos():
            raise InputError(self._too_many(unreadable, self._list_unreadable()))
        if run.in_a_row >= self.config.max_nonfinite + (SCALINGS if run.precision == "fp16" else 0):
            raise InputError(
                f"update {run.update}: loss or gradient not finite {run.in_a_row} times in a row "
                "(train.max_nonfinite): lower train.lr or set train.clip_grad; their videos are in "
                f"{self.output / 'nonfinite.csv'}"
            )
        if due or stop:
            self._save()
            self.saved = time.perf_counter()
        if stop:
            if distributed.is_main():
                bar.write(f"SIGTERM: stopped after update {run.update}, --resume continues")
            distributed.barrier()  # torchrun kills the others soon after one has ended
            raise SystemExit(EXIT_CODE)

    def _videos(self) -> int:
        """Of a whole epoch, over all ranks."""
        return min(len(self.loader.sampler) * distributed.world(), len(self.loader.dataset))

    def _too_many(self, unreadable: float, failures: list[tuple[str, str]]) -> str:
        first = f", the first: {failures[0][1]}" if failures else ""
        if unreadable >= self._videos():
            return f"none of {unreadable:.0f} videos could be read{first}"
        return (
            f"{unreadable:.0f} unreadable videos are more than data.max_unreadable="
            f"{self.loader.dataset.max_unreadable:g} of the {self._videos()} of an epoch{first}"
        )

    def _postfix(self, loss: float | None) -> str:
        """The progress bar's end."""
        run, so_far = self.run, self.run.so_far
        left = (self.config.epochs - run.epoch) * len(self.loader) - so_far.batches
        seconds = int(so_far.seconds / so_far.batches * left)
        return (
            f"loss {'not finite' if loss is None else f'{loss:.3f}'}, lr {run.lr():.1e}, "
            f"{so_far.clips / so_far.seconds:.0f} clips/s, "
            f"data wait {so_far.waited / so_far.seconds:.0%}, "
            f"training ends in {timedelta(seconds=seconds)}"
        )

    def _save(self, best: bool = False, keep: bool = False) -> None:
        """Every rank calls this. `last.pt` last: killed before it, the epoch's end is repeated."""
        state = self.run.state() | self.job.details
        state |= {"random": {"seed": self.seed, "rule": "(seed, update, rank)"}}
        if distributed.is_main():
            if best:
                checkpoint.save(self.output / checkpoint.BEST, state)
            if keep:
                checkpoint.save(self.output / checkpoint.KEPT.format(self.run.epoch), state)
            checkpoint.save_last(self.output, state)

    def _validate(self) -> tuple[Outcome | None, Figures]:
        """One view of each validation video: the outcome on the main process, its figures on all."""
        with torch.compiler.set_stance("force_eager" if self.config.compile else "default"):
            outcome = score(
                self.run.scored_model(),
                self.job.task,
                self.job.val_loader,
                self.job.device,
                precision=self.run.precision,
                title="validating",
                after_batch=self.preemption.exit_if_asked,
            )
        figures = None if outcome is None else self.job.task.figures(outcome)
        return outcome, distributed.from_main(figures)

    def _close_epoch(self, outcome: Outcome | None, figures: Figures) -> bool:
        """The epoch's entry in the log and its list of unreadable files; -> whether it is the best so far.

        outcome: of the validation, on the main process; figures: of the validation, if there was one.
        """
        run, watched = self.run, self.job.task.watched
        failures = self._list_unreadable()
        entry = run.so_far.figures() | {"lr": run.lr(), "unreadable": len(failures)}
        run.epoch += 1
        run.so_far = EpochSoFar()
        validation = {f"val_{key}": figures.get(key) for key in watched}
        validation["val_failed"] = None if outcome is None else len(outcome.failures)
        self.log.write("epoch", step=run.update, at=run.epoch, epoch=run.epoch, **entry, **validation)
        value = figures.get(watched[0])
        better = value is not None and value > run.best
        if better:
            run.best = value
        if distributed.is_main():
            self._print_epoch(entry, value, outcome)
        return better

    def _print_epoch(self, entry: dict, value: float | None, outcome: Outcome | None) -> None:
        epoch, name = self.run.epoch, self.job.task.watched[0]
        for key, what in (("unreadable", "unreadable videos"), ("nonfinite", "updates skipped")):
            if entry[key]:
                print(f"epoch {epoch}: {entry[key]} {what}, see {self.output / key}.csv")
        loss = "not finite" if entry["loss"] is None else f"{entry['loss']:.4f}"
        figure = "" if value is None else f", one-view {name} {value:.2%}, best {self.run.best:.2%}"
        tokens = ""
        if "tokens" in entry:
            counts = entry["tokens"], entry["tokens_least"], entry["tokens_most"]
            tokens = ", {:.1f} tokens a clip ({} to {})".format(*counts)
        print(f"epoch {epoch}: loss {loss}{tokens}{figure}")
        if outcome is not None and outcome.failures:
            count, first = len(outcome.failures), next(iter(outcome.failures.values()))
            print(f"epoch {epoch}: validation could not read {count} videos, the first: {first}")

    def _list_unreadable(self) -> list[tuple[str, str]]:
        """Gather `run.so_far`; into `unreadable.csv` what the epoch under way could not read.

        -> (path, cause) of all ranks on the main process. Every rank calls this.
        """
        self.run.so_far.gather()
        failures = list(self.run.so_far.failures.items())
        self._append_unreadable(failures)
        return failures

    def _append_unreadable(self, failures: Iterable[tuple[str, str]]) -> None:
        rows = [(self.run.epoch + 1, path, cause_of(failure, path)) for path, failure in failures]
        self.log.append("unreadable.csv", UNREADABLE_COLUMNS, rows)
