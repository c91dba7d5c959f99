"""What changes while training: all that a run needs to go on is in its state, and a checkpoint holds it."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from . import distributed, parallel


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

    def figures(self) -> dict[str, float | None]:
        return {
            "loss": self.loss / self.counted if self.counted else None,
            "clips": self.clips,
            "clips_per_second": round(self.clips / self.seconds, 1),
            "data_wait": round(self.waited / self.seconds, 4),
            "seconds": round(self.seconds, 1),
            "nonfinite": self.skipped,
        }


@dataclass
class Run:
    model: nn.Module  # to be called in training: bare, in DistributedDataParallel, or sharded in place
    bare: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    schedule: Any
    plain: nn.Module | None  # the model unsharded, on the CPU; None where nothing is sharded
    epoch: int = 0  # epochs done
    update: int = 0  # updates done, skipped ones too: the schedule and the random state follow it
    in_a_row: int = 0  # updates skipped in a row, up to now
    best: float = -1.0  # best validation top-1 so far
    so_far: EpochSoFar = field(default_factory=EpochSoFar)

    def lr(self) -> float:
        """The learning rate of layers that are not decayed."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def change(self, norm: Tensor, clip_grad: float | None) -> None:
        """An update by the gradient, which has this norm."""
        if clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.bare.parameters(), clip_grad, norm)
        self.optimizer.step()
        self.in_a_row = 0
        self._next()
        if self.ema is not None:
            self.ema.update(self.bare, self.update)

    def skip(self, buffers: Sequence[Tensor]) -> None:
        """As if the update had not been, but for its number. buffers: what those kept were before it."""
        for buffer, before in zip(distributed.kept_buffers(self.bare), buffers, strict=True):
            buffer.copy_(before)
        self.in_a_row += 1
        self.so_far.skipped += 1
        self._next()

    def _next(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.update += 1
        self.schedule.step_update(self.update)

    def scored_model(self) -> nn.Module:
        """The averaged weights, where there are some; alike on every rank. Every rank calls this."""
        model = self.bare if self.ema is None else self.ema.module
        if self.plain is not None:
            device = next(model.parameters()).device
            whole = parallel.whole(model.state_dict(), everywhere=True)
            model = copy.deepcopy(self.plain)
            model.load_state_dict(whole)
            model.to(device)
        distributed.share(distributed.kept_buffers(model))
        return model

    def state(self) -> dict[str, Any]:
        """Plain values and whole tensors; complete on the main process. Every rank calls this."""
        self.so_far.failures = dict(distributed.to_main(list(self.so_far.failures.items())))
        return parallel.whole(
            {
                "model": self.bare.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
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
        for name in ("epoch", "update", "in_a_row", "best"):
            setattr(self, name, state[name])
        self.so_far = EpochSoFar(**state["so_far"])
        if not distributed.is_main():
            self.so_far.failures = {}
