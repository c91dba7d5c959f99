"""Training, from top to bottom: `fit` runs epochs of updates, validates, and keeps checkpoints."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.annotations import Row
from ..data.batch import Batch
from ..data.sampling import mixed_seed
from ..data.transforms import Mix
from ..errors import InputError
from . import checkpoint, distributed, parallel
from .evaluate import Scores, evaluate, use_bf16
from .figures import draw_curves
from .logs import RunLog, progress, read_log
from .optim import make_optimizer, make_schedule, scaled_lr
from .parallel import Parallel
from .preemption import EXIT_CODE, Preemption
from .run import EpochSoFar, Run


@dataclass
class TrainConfig:
    """Training: AdamW, cosine with warm-up."""

    epochs: int = 30
    """Passes over the training list."""
    batch_size: int = 8
    """Videos of a rank in one forward pass (data.repeats clips each)."""
    accumulate: int = 1
    """Forward passes in one update."""
    lr: float = 5e-4
    """Peak learning rate for lr_per videos an update; scaled linearly to the real number."""
    lr_per: int = 256
    """Videos an update that lr, warmup_lr and min_lr are meant for."""
    warmup_epochs: float = 5.0
    """Linear warm-up."""
    warmup_lr: float = 1e-6
    """Where the warm-up starts."""
    min_lr: float = 1e-6
    """Where the cosine ends."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averages."""
    weight_decay: float = 0.05
    """AdamW's; not on biases, norms, position tables and G."""
    layer_decay: float | None = None
    """Learning rate falls by this factor from layer to layer, downwards; null: none."""
    clip_grad: float | None = None
    """Largest norm of the gradient; null: any."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    erasing: float = 0.0
    """Share of the clips that lose a random box."""
    mixup: float = 0.0
    """Alpha of mixup; 0: none. With cutmix too, they take turns."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0: none."""
    ema: float | None = None
    """Decay of the averaged weights, which are then the ones validated and scored; null: none."""
    bf16: bool | None = None
    """bfloat16 autocast; null: on CUDA only."""
    max_nonfinite: int = 10
    """Updates in a row with a loss or gradient that is not finite, all skipped, before the run stops."""
    eval_every: int = 1
    """Epochs between validations."""
    log_every: int = 10
    """Updates between log entries."""
    checkpoint_minutes: float | None = 15.0
    """Minutes between checkpoints within an epoch; null: only where one ends."""
    parallel: Parallel = "ddp"
    """Several processes: a model each (ddp), or one model in shares (fsdp2: less memory, more traffic)."""


def fit(
    model: nn.Module,
    normalise: nn.Module,
    train_loader: DataLoader,
    val_loader: DataLoader | None,
    config: TrainConfig,
    *,
    num_classes: int,
    view_batch: int,
    on_failure: str = "wrong",
    max_unreadable: float = 1.0,
    output: Path,
    seed: int,
    resume: dict[str, Any] | None,
    details: dict[str, Any],
) -> Path:
    """Train; -> the checkpoint to score: `best.pt`, by validation top-1 (`last.pt` without validation).

    The model and `normalise` are on their device. Every update seeds torch with (seed, update, rank), so
    the random state of a run is its update counter.
    on_failure: whether unreadable videos count as wrong in validation, or are left out ("exclude").
    max_unreadable: share of an epoch's videos; with more unreadable ones the run stops.
    resume: contents of a checkpoint to continue from.
    details: what else belongs into checkpoints: class names, resolved settings.
    """
    device = normalise.mean.device
    bf16 = use_bf16(config.bf16, device)
    per_update = config.batch_size * config.accumulate * distributed.world()
    lr, warmup_lr, min_lr = (
        scaled_lr(value, per_update, config.lr_per)
        for value in (config.lr, config.warmup_lr, config.min_lr)
    )
    updates_an_epoch = math.ceil(len(train_loader) / config.accumulate)
    run = _start(model, config, (lr, warmup_lr, min_lr), updates_an_epoch, device)
    if resume is not None:
        run.load(resume)
    mix = Mix(num_classes, erasing=config.erasing, mixup=config.mixup, cutmix=config.cutmix)
    if distributed.is_main():
        print(
            f"learning rate {lr:.3g} = {config.lr:g} (train.lr) x {per_update} videos an update "
            f"({config.batch_size} x {config.accumulate} accumulated x {distributed.world()} ranks; "
            f"repeated clips not counted) / {config.lr_per} (train.lr_per)"
        )
    details = details | {"random": {"seed": seed, "rule": "(seed, update, rank)"}}

    def save(best: bool = False) -> None:
        """Every rank calls this. `best.pt` first: killed before `last.pt`, the epoch's end is repeated."""
        state = run.state() | details
        if distributed.is_main():
            if best:
                checkpoint.save(output / checkpoint.BEST, state)
            checkpoint.save_last(output, state)

    log = RunLog(output, epoch=run.epoch, update=run.update)
    with Preemption() as preemption, closing(log):
        while run.epoch < config.epochs:
            _epoch(
                run,
                normalise,
                mix,
                train_loader,
                config,
                log,
                save,
                preemption,
                seed=seed,
                bf16=bf16,
                max_unreadable=max_unreadable,
            )
            scores = None
            due = (run.epoch + 1) % config.eval_every == 0 or run.epoch + 1 == config.epochs
            if val_loader is not None and due:
                save()  # so that SIGTERM and failures of the validation cost the validation alone
                scores = evaluate(
                    run.scored_model(),
                    normalise,
                    val_loader,
                    num_classes=num_classes,
                    view_batch=view_batch,
                    bf16=bf16,
                    on_failure=on_failure,
                    title="validating",
                    after_batch=preemption.exit_if_asked,
                )
            save(best=_close_epoch(run, scores, log))
    if distributed.is_main():
        draw_curves(read_log(log.path), output / "curves.png")
    distributed.barrier()
    return output / (checkpoint.LAST if val_loader is None else checkpoint.BEST)


def _start(
    model: nn.Module,
    config: TrainConfig,
    rates: tuple[float, float, float],
    updates_an_epoch: int,
    device: torch.device,
) -> Run:
    """A new run. rates: peak, first and last learning rate."""
    lr, warmup_lr, min_lr = rates
    sharded = config.parallel == "fsdp2" and distributed.world() > 1
    plain = copy.deepcopy(model).cpu() if sharded else None
    ema = None
    if config.ema is not None:
        one_by_one = bool(distributed.kept_buffers(model))  # buffers are not sharded, parameters may be
        ema = ModelEmaV3(model, decay=config.ema, use_warmup=True, foreach=not one_by_one)
        if sharded:
            parallel.shard(ema.module, device)
    wrapped = parallel.wrap(model, config.parallel, device)
    optimizer = make_optimizer(
        model,
        lr=lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
    )
    schedule = make_schedule(
        optimizer,
        updates=config.epochs * updates_an_epoch,
        warmup_updates=round(config.warmup_epochs * updates_an_epoch),
        warmup_lr=warmup_lr,
        min_lr=min_lr,
    )
    return Run(wrapped, model, ema, optimizer, schedule, plain)


def _epoch(
    run: Run,
    normalise: nn.Module,
    mix: Mix,
    loader: DataLoader,
    config: TrainConfig,
    log: RunLog,
    save: Callable[[], None],
    preemption: Preemption,
    *,
    seed: int,
    bf16: bool,
    max_unreadable: float,
) -> None:
    """One pass over the training list, or what is left of it; its figures are in `run.so_far`.

    save: writes a checkpoint; every rank calls it.
    Raises SystemExit(143) after an update and its checkpoint, when SIGTERM came.
    """
    device = normalise.mean.device
    so_far = run.so_far
    loader.sampler.epoch, loader.sampler.batches_done = run.epoch, so_far.batches
    batches = iter(loader)
    run.model.train()
    videos = min(len(loader.sampler) * distributed.world(), len(loader.dataset))  # of a whole epoch
    title = f"epoch {run.epoch + 1}/{config.epochs}"
    ready = saved = time.perf_counter()
    with progress(total=len(loader), initial=so_far.batches, desc=title, unit="batch") as bar:
        while so_far.batches < len(loader):
            torch.manual_seed(mixed_seed(seed, run.update, distributed.rank()))
            buffers = [buffer.clone() for buffer in distributed.kept_buffers(run.bare)]
            parts = min(config.accumulate, len(loader) - so_far.batches)
            passes = []
            for part in range(parts):
                asked = time.perf_counter()
                batch = next(batches)
                so_far.waited += time.perf_counter() - asked
                so_far.failures |= dict(batch.failures)
                if batch.failed:
                    found = batch.failures
                    raise InputError(
                        f"{len(found)} unreadable videos are more than data.max_unreadable="
                        f"{max_unreadable:g} of the {videos} of an epoch, the first: {found[0][1]}"
                    )
                last = part + 1 == parts
                loss = _forward_backward(run, normalise, mix, batch, config, bf16, parts, last)
                passes.append((batch.indices, loss))
                so_far.clips += batch.targets.numel() * distributed.world()
                so_far.batches += 1
                bar.update()

            norm = parallel.gradient_norm(run.bare)
            loss, size = torch.stack([sum(loss for _, loss in passes) / parts, norm]).tolist()
            broken = not (math.isfinite(loss) and math.isfinite(size))
            minutes = (time.perf_counter() - saved) / 60
            due = config.checkpoint_minutes is not None and minutes >= config.checkpoint_minutes
            # What the ranks do next they must do alike, so they go by the sums of what each has seen.
            seen = (loss, broken, due and distributed.is_main(), preemption.asked, len(so_far.failures))
            loss, broken, due, stop, unreadable = distributed.total(seen, device)
            if broken:
                run.skip(buffers)
                log.append("nonfinite.csv", RECORD, _record(run, passes, loader.dataset.rows))
            else:
                run.change(norm, config.clip_grad)
                so_far.loss += loss / distributed.world() * parts
                so_far.counted += parts
            so_far.seconds += time.perf_counter() - ready

            if run.update % config.log_every == 0 or so_far.batches == len(loader):
                shown = None if broken else loss / distributed.world()
                at = round(run.epoch + so_far.batches / len(loader), 4)
                log.write("step", step=run.update, at=at, loss=shown, lr=run.lr())
                bar.set_postfix_str(_postfix(run, shown, config, len(loader)), refresh=False)
            if unreadable > max_unreadable * videos:
                found = _list_unreadable(run, log)
                first = f", the first: {found[0][1]}" if found else ""
                raise InputError(
                    f"{unreadable:.0f} unreadable videos are more than data.max_unreadable="
                    f"{max_unreadable:g} of the {videos} of an epoch{first}"
                )
            if run.in_a_row >= config.max_nonfinite:
                raise InputError(
                    f"update {run.update}: loss or gradient not finite {run.in_a_row} times in a row "
                    "(train.max_nonfinite): lower train.lr or set train.clip_grad; their videos are in "
                    f"{log.folder / 'nonfinite.csv'}"
                )
            if due or stop:
                save()
                saved = time.perf_counter()
            if stop:
                if distributed.is_main():
                    bar.write(f"SIGTERM: stopped after update {run.update}, --resume continues")
                raise SystemExit(EXIT_CODE)
            ready = time.perf_counter()


def _forward_backward(
    run: Run,
    normalise: nn.Module,
    mix: Mix,
    batch: Batch,
    config: TrainConfig,
    bf16: bool,
    parts: int,
    last: bool,
) -> Tensor:
    """One batch of an update's `parts`; gradients are exchanged between ranks with the last."""
    device = normalise.mean.device
    # Views first: mixing pairs neighbours, and clips of one video are not to be mixed with each other.
    clips = batch.clips.transpose(0, 1).flatten(0, 1).to(device, non_blocking=True)
    labels = batch.targets.t().flatten().to(device, non_blocking=True)
    clips, targets = mix(normalise(clips), labels)
    with parallel.exchange(run.model, last):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = run.model(clips)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
        (loss / parts).backward()
    return loss.detach()


RECORD = ("epoch", "update", "rank", "loss", "index", "path")


def _record(run: Run, passes: Sequence[tuple[Tensor, Tensor]], rows: Sequence[Row]) -> list[tuple]:
    """The videos of an update that was skipped, a row each, of all ranks. passes: (indices, loss)."""
    own = [
        (run.epoch + 1, run.update, distributed.rank(), loss.item(), index, rows[index].path)
        for indices, loss in passes
        for index in indices.tolist()
    ]
    return distributed.to_main(own)


def _postfix(run: Run, loss: float | None, config: TrainConfig, batches: int) -> str:
    """The progress bar's end. batches: of an epoch."""
    so_far = run.so_far
    left = (config.epochs - run.epoch) * batches - so_far.batches
    seconds = int(so_far.seconds / so_far.batches * left)
    return (
        f"loss {'not finite' if loss is None else f'{loss:.3f}'}, lr {run.lr():.1e}, "
        f"{so_far.clips / so_far.seconds:.0f} clips/s, data wait {so_far.waited / so_far.seconds:.0%}, "
        f"training ends in {timedelta(seconds=seconds)}"
    )


def _close_epoch(run: Run, scores: Scores | None, log: RunLog) -> bool:
    """The epoch's entry in the log and its list of unreadable files; -> whether it is the best so far."""
    failures = _list_unreadable(run, log)
    figures = run.so_far.figures() | {"lr": run.lr(), "unreadable": len(failures)}
    run.epoch += 1
    run.so_far = EpochSoFar()
    metrics = {} if scores is None else scores.metrics()
    validation = {f"val_{key}": metrics.get(key) for key in ("top1", "top5")}
    validation["val_failed"] = None if scores is None else len(scores.failures)
    log.write("epoch", step=run.update, at=run.epoch, epoch=run.epoch, **figures, **validation)
    top1 = metrics.get("top1")
    better = top1 is not None and top1 > run.best
    if better:
        run.best = top1
    if distributed.is_main():
        for key, what in (("unreadable", "unreadable videos"), ("nonfinite", "updates skipped")):
            if figures[key]:
                print(f"epoch {run.epoch}: {figures[key]} {what}, see {log.folder / key}.csv")
        if top1 is not None:
            loss = "not finite" if figures["loss"] is None else f"{figures['loss']:.4f}"
            print(f"epoch {run.epoch}: loss {loss}, one-view top-1 {top1:.2%}, best {run.best:.2%}")
        if scores is not None and scores.failures:
            first = next(iter(scores.failures.values()))
            print(
                f"epoch {run.epoch}: validation could not read {len(scores.failures)} videos, "
                f"the first: {first}"
            )
    return better


def _list_unreadable(run: Run, log: RunLog) -> list[tuple[str, str]]:
    """Into `unreadable.csv` what the epoch under way could not read.

    -> (path, cause) of all ranks on the main process. Every rank calls this.
    """
    failures = list(dict(distributed.to_main(list(run.so_far.failures.items()))).items())
    header = ("epoch", "path", "cause")
    log.append("unreadable.csv", header, [(run.epoch + 1, *failure) for failure in failures])
    return failures
