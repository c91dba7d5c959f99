"""Layers that are not trained: a linear probe, or the first N. What is frozen has no gradient, and computes
as in scoring: no batch statistics, no drop path."""

from typing import Literal

from timm.models import group_parameters
from torch import nn

from ..errors import InputError


def freeze(model: nn.Module, what: Literal["backbone"] | int | None) -> None:
    """Freeze all but norm and head ("backbone"), or the embedding and the first layers, so many.

    What is frozen already stays so, as the norms that a `Segmenter` leaves out. Layers are those of
    `model.group_matcher()`. Raises InputError for more layers than there are, and for a model that does not
    say what its layers are.
    """
    if what is None:
        return
    if not hasattr(model, "group_matcher"):
        raise InputError(
            f"train.freeze={what}: {type(model).__name__} does not say what its layers are "
            "(no group_matcher)"
        )
    layer = group_parameters(model, model.group_matcher(), reverse=True)  # 0: embedding; the last: the head
    layers = max(layer.values()) - 1
    if what != "backbone" and what > layers:
        raise InputError(f"train.freeze={what}: the model has {layers} layers")
    last = layers if what == "backbone" else what
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and layer[name] > last)


def train_mode(model: nn.Module) -> None:
    """`model.train()`, but for modules of which all parameters are frozen."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
