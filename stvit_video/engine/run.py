"""What changes while training: one update of it, and the state that a checkpoint holds."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.sampling import mixed_seed
from . import distributed, parallel
from .device import autocast
from .job import Task


@dataclass
class EpochSoFar:
    """What the epoch under way has come to, over all ranks; empty between epochs."""

    batches: int = 0  # a rank's, done
    loss: float = 0.0  # summed over `counted` batches, a rank's
    counted: int = 0  # batches of updates that were not skipped
    skipped: int = 0  # updates whose loss or gradient was not finite
    clips: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # for data, of these
    failures: dict[str, str] = field(default_factory=dict)  # cause by path; until gathered, a rank's
    tokens: dict[int, int] = field(default_factory=dict)  # clips by their number of tokens; likewise

    def gather(self) -> None:
        """What each rank has for itself: all of it on the main process, none elsewhere. Every rank calls
        this."""
        parts = distributed.to_main([(self.failures, Counter(self.tokens))])
        self.failures = {path: cause for failures, _ in parts for path, cause in failures.items()}
        self.tokens = dict(sum((tokens for _, tokens in parts), Counter()))

    def rescale(self, accumulate: int, before: int) -> None:
        """Count in batches of another accumulation: an update is as many videos as before."""
        self.batches, self.counted = (n // before * accumulate for n in (self.batches, self.counted))
        self.loss *= accumulate / before

    def figures(self) -> dict[str, float | None]:
        """Of what is gathered. tokens of a clip, the mean, the least and the most: where clips differ."""
        clips, tokens = sum(self.tokens.values()), {}
        if clips:
            total = sum(number * times for number, times in self.tokens.items())
            least, most = min(self.tokens), max(self.tokens)
            tokens = {"tokens": total / clips, "tokens_least": least, "tokens_most": most}
        return {
            "loss": self.loss / self.counted if self.counted else None,
            "clips": self.clips,
            "clips_per_second": round(self.clips / self.seconds, 1),
            "data_wait": round(self.waited / self.seconds, 4),
            "seconds": round(self.seconds, 1),
            "nonfinite": self.skipped,
        } | tokens


class Update(NamedTuple):
    """What came of an update. losses: means over its batches and the ranks, "loss" first; passes: indices
    (B,) and loss of each of this rank's batches; flags: the caller's, summed over the ranks."""

    losses: dict[str, float]
    skipped: bool
    flags: list[float]
    passes: list[tuple[Tensor, Tensor]]


@dataclass
class Run:
    model: nn.Module  # to be called in training: bare, in DistributedDataParallel, or sharded in place
    bare: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    schedule: Any
    plain: nn.Module | None  # the model unsharded, on the CPU; None where nothing is sharded
    device: torch.device
    precision: str = "fp32"
    clip_grad: float | None = None
    epoch: int = 0  # epochs done
    update: int = 0  # updates done, skipped ones too: the schedule and the random state follow it
    in_a_row: int = 0  # updates skipped in a row, up to now
    best: float = -1.0  # the best value of the task's first figure so far
    so_far: EpochSoFar = field(default_factory=EpochSoFar)

    def __post_init__(self):
        self.buffers = distributed.kept_buffers(self.bare)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def make_update(
        self,
        task: Task,
        batches: Iterator[Batch],
        parts: int,
        *,
        seed: int,
        flags: Callable[[], Sequence[float]] = tuple,
        prefetch: Callable[[], None] = lambda: None,
    ) -> Update:
        """One update from the next `parts` batches; torch is seeded by (seed, update, rank).

        The device is waited for once: for the losses, the norm and the flags, after `prefetch` was called.
        Where loss or gradient is not finite on some rank, no rank changes its model.
        flags: asked for after the last batch; what the ranks do by them, they do alike.
        """
        torch.manual_seed(mixed_seed(seed, self.update, distributed.rank()))
        before = [buffer.clone() for buffer in self.buffers]
        indices, losses, tokens = [], [], []
        for part in range(parts):
            batch = next(batches)
            indices.append(batch.indices)
            losses.append(self._backward(task, batch, parts, last=part + 1 == parts))
            tokens.append(getattr(self.bare, "clip_tokens", None))
        prefetch()
        self.scaler.unscale_(self.optimizer)
        norm = parallel.gradient_norm(self.bare)
        names, asked = list(losses[0]), flags()
        means = [sum(loss[name] for loss in losses) / parts for name in names]
        finite = means[names.index("loss")].isfinite() & norm.isfinite()
        kind = torch.float32 if self.device.type == "mps" else torch.float64
        said = [norm.new_full((), flag, dtype=kind) for flag in asked]
        sums = torch.stack([(~finite).to(kind), *(mean.to(kind) for mean in means), *said])
        distributed.sums(sums)
        broken, *values = sums.tolist()  # the one place where the device is waited for
        values, flagged = values[: len(names)], values[len(names) :]
        for counts in tokens:
            if counts is not None:
                self.so_far.tokens = dict(Counter(self.so_far.tokens) + Counter(counts.tolist()))
        if broken:
            self.skip(before)
        else:
            self.change(norm)
        mean = {name: value / distributed.world() for name, value in zip(names, values, strict=True)}
        passes = [(i, loss["loss"]) for i, loss in zip(indices, losses, strict=True)]
        return Update(mean, bool(broken), flagged, passes)

    def _backward(self, task: Task, batch: Batch, parts: int, *, last: bool) -> dict[str, Tensor]:
        """One batch of an update's `parts`; gradients are exchanged between ranks with the last."""
        with parallel.exchange(self.model, last):
            with autocast(self.device, self.precision):
                losses = task.loss(self.model, batch)
            self.scaler.scale(losses["loss"] / parts).backward()
        return {name: loss.detach().float() for name, loss in losses.items()}

    def change(self, norm: Tensor) -> None:
        """By the gradient, which has this norm."""
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.bare.parameters(), self.clip_grad, norm)
        self.scaler.step(self.optimizer)
        self.in_a_row = 0
        self._next()
        if self.ema is not None:
            self.ema.update(self.bare, self.update)

    def skip(self, before: Sequence[Tensor]) -> None:
        """As if the update had not been, but for its number. before: what the buffers were."""
        for buffer, value in zip(self.buffers, before, strict=True):
            buffer.copy_(value)
        self.in_a_row += 1
        self.so_far.skipped += 1
        self._next()

    def _next(self) -> None:
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.update += 1
        self.schedule.step_update(self.update)

    def lr(self) -> float:
        """The learning rate where neither layer decay nor the head's factor changes it."""
        groups = self.optimizer.param_groups
        plain = [group["lr"] for group in groups if group.get("lr_scale", 1.0) == 1]
        return max(plain or [group["lr"] for group in groups])

    def scored_model(self) -> nn.Module:
        """The averaged weights, where there are some; alike on every rank. Every rank calls this."""
        model = self.bare if self.ema is None else self.ema.module
        if self.plain is not None:
            state = parallel.whole(model.state_dict(), everywhere=True)
            model = copy.deepcopy(self.plain)
            model.load_state_dict(state)
            model.to(self.device)
        distributed.share(distributed.kept_buffers(model))
        return model

    def state(self) -> dict[str, Any]:
        """Plain values and whole tensors; complete on the main process. Every rank calls this."""
        self.so_far.gather()
        return parallel.whole(
            {
                "model": self.bare.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(),
                "epoch": self.epoch,
                "update": self.update,
                "in_a_row": self.in_a_row,
                "best": self.best,
                "so_far": asdict(self.so_far),
            }
        )

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, on whatever number of processes and however sharded."""
        parallel.load_model(self.bare, state["model"])
        if self.ema is not None:
            parallel.load_model(self.ema.module, state["ema"])
        parallel.load_optimizer(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        for name in ("epoch", "update", "in_a_row", "best"):
            setattr(self, name, state[name])
        self.so_far = EpochSoFar(**state["so_far"])
        if not distributed.is_main():
            self.so_far.failures, self.so_far.tokens = {}, {}
