"""Training, from top to bottom: `fit` runs epochs of updates, validates, and keeps checkpoints."""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..data.dataset import Batch, mixed_seed
from ..data.transforms import Mix
from ..errors import InputError
from . import checkpoint, distributed
from .evaluate import Scores, evaluate, use_bf16
from .figures import draw_curves
from .logs import RunLog, progress, read_log
from .optim import make_optimizer, make_schedule, scaled_lr
from .unreadable import gather_unreadable, note_unreadable


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
    eval_every: int = 1
    """Epochs between validations."""
    log_every: int = 10
    """Updates between log entries."""


@dataclass
class Run:
    """What changes while training, and is resumed."""

    model: nn.Module  # bare, or in DistributedDataParallel
    bare: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    schedule: Any
    epoch: int = 0  # epochs done
    update: int = 0  # updates done
    best: float = -1.0  # best validation top-1 so far

    def scored_model(self) -> nn.Module:
        return self.bare if self.ema is None else self.ema.module

    def state(self) -> dict[str, Any]:
        return {
            "model": self.bare.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "update": self.update,
            "best": self.best,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.bare.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.update, self.best = state["epoch"], state["update"], state["best"]


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
    ema = None if config.ema is None else ModelEmaV3(model, decay=config.ema, use_warmup=True)
    run = Run(_parallel(model, device), model, ema, optimizer, schedule)
    if resume is not None:
        run.load(resume)
    mix = Mix(num_classes, erasing=config.erasing, mixup=config.mixup, cutmix=config.cutmix)
    if distributed.is_main():
        print(
            f"learning rate {lr:.3g} = {config.lr:g} (train.lr) x {per_update} videos an update "
            f"({config.batch_size} x {config.accumulate} accumulated x {distributed.world()} ranks; "
            f"repeated clips not counted) / {config.lr_per} (train.lr_per)"
        )

    log = RunLog(output, epochs_done=run.epoch)
    details = details | {"random": {"seed": seed, "rule": "(seed, update, rank)"}}
    while run.epoch < config.epochs:
        figures, failures = _epoch(
            run,
            normalise,
            mix,
            train_loader,
            config,
            log,
            seed=seed,
            bf16=bf16,
            max_unreadable=max_unreadable,
        )
        run.epoch += 1
        scores = None
        due = run.epoch % config.eval_every == 0 or run.epoch == config.epochs
        if val_loader is not None and due:
            distributed.share_buffers(run.scored_model())
            scores = evaluate(
                run.scored_model(),
                normalise,
                val_loader,
                num_classes=num_classes,
                view_batch=view_batch,
                bf16=bf16,
                on_failure=on_failure,
                title="validating",
            )
        _close_epoch(run, figures, failures, scores, log, output, details)
    log.close()
    if distributed.is_main():
        draw_curves(read_log(log.path), output / "curves.png")
    distributed.barrier()
    return output / ("last.pt" if val_loader is None else "best.pt")


def _parallel(model: nn.Module, device: torch.device) -> nn.Module:
    if distributed.world() == 1:
        return model
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None)


def _epoch(
    run: Run,
    normalise: nn.Module,
    mix: Mix,
    loader: DataLoader,
    config: TrainConfig,
    log: RunLog,
    *,
    seed: int,
    bf16: bool,
    max_unreadable: float,
) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """One pass over the training list -> its figures, and (path, cause) of what could not be read."""
    loader.sampler.epoch = run.epoch
    run.model.train()
    title = f"epoch {run.epoch + 1}/{config.epochs}"
    losses, failures, clips, waited = [], [], 0, 0.0
    output = log.path.parent
    started = ready = time.perf_counter()
    with progress(total=len(loader), desc=title, unit="batch") as bar:
        for i, batch in enumerate(loader):
            waited += time.perf_counter() - ready
            failures += batch.failures
            if batch.failed:
                raise InputError(f"{len(failures)} videos in a row unreadable, the first: {failures[0][1]}")
            group = i // config.accumulate * config.accumulate  # the batches of one update start here
            if i == group:
                torch.manual_seed(mixed_seed(seed, run.update, distributed.rank()))
            parts = min(config.accumulate, len(loader) - group)
            whole = i + 1 == group + parts
            losses.append(_forward_backward(run, normalise, mix, batch, config, bf16, parts, whole))
            clips += batch.labels.numel() * distributed.world()
            if whole:
                _update(run, config)
                if run.update % config.log_every == 0 or i + 1 == len(loader):
                    gather_unreadable(failures, loader, max_unreadable, output, run.epoch + 1)
                    loss, passed = losses[-1].item(), time.perf_counter() - started
                    if not math.isfinite(loss):
                        remedy = "lower train.lr or set train.clip_grad"
                        raise InputError(f"the loss is {loss} at update {run.update}: {remedy}")
                    at = round(run.epoch + (i + 1) / len(loader), 4)
                    log.write("step", step=run.update, at=at, loss=loss, lr=_lr(run))
                    left = passed / (i + 1) * ((config.epochs - run.epoch) * len(loader) - i - 1)
                    bar.set_postfix_str(
                        f"loss {loss:.3f}, lr {_lr(run):.1e}, {clips / passed:.0f} clips/s, "
                        f"data wait {waited / passed:.0%}, training ends in {timedelta(seconds=int(left))}",
                        refresh=False,
                    )
            bar.update()
            ready = time.perf_counter()
    seconds = time.perf_counter() - started
    everywhere = distributed.gather(torch.stack(losses).mean().item())
    failures = gather_unreadable(failures, loader, max_unreadable, output, run.epoch + 1)
    figures = {
        "loss": sum(everywhere) / len(everywhere),
        "lr": _lr(run),
        "clips_per_second": round(clips / seconds, 1),
        "data_wait": round(waited / seconds, 4),
        "seconds": round(seconds, 1),
        "unreadable": len(failures),
    }
    return figures, failures


def _forward_backward(
    run: Run,
    normalise: nn.Module,
    mix: Mix,
    batch: Batch,
    config: TrainConfig,
    bf16: bool,
    parts: int,
    whole: bool,
) -> Tensor:
    """One batch of an update's `parts`; gradients are exchanged between ranks with its last."""
    device = normalise.mean.device
    # Views first: mixing pairs neighbours, and clips of one video are not to be mixed with each other.
    clips = batch.clips.transpose(0, 1).flatten(0, 1).to(device, non_blocking=True)
    labels = batch.labels.t().flatten().to(device, non_blocking=True)
    clips, targets = mix(normalise(clips), labels)
    alone = nullcontext() if whole or distributed.world() == 1 else run.model.no_sync()
    with alone:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = run.model(clips)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
        (loss / parts).backward()
    return loss.detach()


def _update(run: Run, config: TrainConfig) -> None:
    if config.clip_grad is not None:
        nn.utils.clip_grad_norm_(run.bare.parameters(), config.clip_grad)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.update += 1
    run.schedule.step_update(run.update)
    if run.ema is not None:
        run.ema.update(run.bare, run.update)


def _lr(run: Run) -> float:
    """The learning rate of layers that are not decayed."""
    return max(group["lr"] for group in run.optimizer.param_groups)


def _close_epoch(
    run: Run,
    figures: dict[str, float],
    failures: list[tuple[str, str]],
    scores: Scores | None,
    log: RunLog,
    output: Path,
    details: dict[str, Any],
) -> None:
    """Log line, list of unreadable files, and checkpoints of a finished epoch; main process only."""
    metrics = {} if scores is None else scores.metrics()
    top1 = metrics.get("top1")
    better = top1 is not None and top1 > run.best
    if better:
        run.best = top1
    if not distributed.is_main():
        return
    validation = {f"val_{key}": metrics.get(key) for key in ("top1", "top5")}
    validation["val_failed"] = None if scores is None else len(scores.failures)
    log.write("epoch", step=run.update, at=run.epoch, epoch=run.epoch, **figures, **validation)
    if top1 is not None:
        print(
            f"epoch {run.epoch}: loss {figures['loss']:.4f}, one-view top-1 {top1:.2%}, best {run.best:.2%}"
        )
    note_unreadable(output, run.epoch, failures)
    if scores is not None and scores.failures:
        print(
            f"epoch {run.epoch}: validation could not read {len(scores.failures)} videos, "
            f"the first: {next(iter(scores.failures.values()))}"
        )
    state = run.state() | details
    checkpoint.save(output / "last.pt", state)
    if better:
        checkpoint.save(output / "best.pt", state)
