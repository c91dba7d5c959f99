"""AdamW, its parameter groups and the schedules, all timm's; and the rule that scales lr."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..errors import InputError
from .settings import Schedule

POWER = 0.9  # of "poly", as in the segmentation recipes of mmsegmentation


def scaled_lr(lr: float, batch: int, per: int) -> float:
    """lr * batch / per. `batch`: videos per update over all ranks; repeated clips do not count."""
    return lr * batch / per


def make_optimizer(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    layer_decay: float | None,
    head_lr: float = 1.0,
) -> torch.optim.Optimizer:
    """AdamW (fused on GPUs). Biases, norms and `model.no_weight_decay()` are not decayed.

    layer_decay: lr of a layer = lr * layer_decay ^ (layers above it), by `model.group_matcher`; a model
        without one is an InputError (timm would silently decay nothing, or by guesswork).
    head_lr: factor on the rate of what is named `head.*`.
    """
    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, skip)
    elif hasattr(model, "group_matcher"):
        groups = param_groups_layer_decay(model, weight_decay, skip, layer_decay=layer_decay)
    else:
        raise InputError(
            f"train.layer_decay={layer_decay}: {type(model).__name__} does not say what its layers "
            "are (no group_matcher); set it to null"
        )
    if head_lr != 1:
        head = {id(p) for name, p in model.named_parameters() if name.startswith("head.")}
        groups = [part for group in groups for part in _split(group, head, head_lr)]
    on_gpu = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=on_gpu or None)


def _split(group: dict[str, Any], head: set[int], factor: float) -> list[dict[str, Any]]:
    """A group without the head's parameters, and these alone, whose rate has a factor; no empty ones."""
    scale = group.get("lr_scale", 1.0)
    parts = [
        group | {"params": [p for p in group["params"] if (id(p) in head) == of_head], "lr_scale": value}
        for of_head, value in ((False, scale), (True, scale * factor))
    ]
    return [part for part in parts if part["params"]]


def make_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    updates: int,
    warmup_updates: int,
    warmup_lr: float,
    min_lr: float,
    kind: Schedule = "cosine",
    steps: Sequence[int] = (),
) -> Scheduler:
    """Linear warm-up from `warmup_lr`, down to `min_lr`: by a cosine, or linear to the power 0.9 (poly).

    "steps": down to a tenth after each of `steps` updates, from the run's beginning. All count updates.
    """
    warmup_updates = min(warmup_updates, max(updates - 1, 0))
    common = {
        "warmup_t": warmup_updates,
        "warmup_lr_init": warmup_lr,
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    if kind == "steps":  # timm takes a step one update early
        after = [step - warmup_updates + 1 for step in sorted(steps)]
        return MultiStepLRScheduler(optimizer, decay_t=after, decay_rate=0.1, **common)
    falling = {"t_initial": updates - warmup_updates, "lr_min": min_lr}
    if kind == "poly":
        return PolyLRScheduler(optimizer, power=POWER, **falling, **common)
    return CosineLRScheduler(optimizer, **falling, **common)
