"""AdamW, its parameter groups and the cosine schedule, all timm's; and the rule that scales lr."""

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from ..errors import InputError


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
) -> torch.optim.Optimizer:
    """AdamW (fused on GPUs). Biases, norms and `model.no_weight_decay()` are not decayed.

    layer_decay: lr of a layer = lr * layer_decay ^ (layers above it), by `model.group_matcher`; a model
        without one is an InputError (timm would silently decay nothing, or by guesswork).
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
    on_gpu = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=on_gpu or None)


def make_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    updates: int,
    warmup_updates: int,
    warmup_lr: float,
    min_lr: float,
) -> CosineLRScheduler:
    """Linear warm-up from `warmup_lr`, then a cosine down to `min_lr`; steps count updates."""
    warmup_updates = min(warmup_updates, max(updates - 1, 0))
    return CosineLRScheduler(
        optimizer,
        t_initial=updates - warmup_updates,
        lr_min=min_lr,
        warmup_t=warmup_updates,
        warmup_lr_init=warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )
