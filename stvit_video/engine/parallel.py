"""One model on several processes: DistributedDataParallel, or sharded by torch's `fully_shard` (FSDP2).

States go out and in whole, under the plain model's names: a checkpoint does not know how it was trained.
All functions here are collective: every rank calls them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..models.layers import Block
from . import distributed

Parallel = Literal["ddp", "fsdp2"]


def wrap(model: nn.Module, kind: Parallel, device: torch.device) -> nn.Module:
    """What to call in training. One process: the model itself. fsdp2 shards the model in place.

    Each `Block` is gathered for its turn and let go again; what is outside of blocks stays together.
    """
    if distributed.world() == 1:
        return model
    if kind == "ddp":
        return DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    buffers = distributed.kept_buffers(model)  # not sharded; shared as DistributedDataParallel does
    model.register_forward_pre_hook(lambda *_: distributed.share(buffers))
    return shard(model, device)


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    mesh = init_device_mesh(device.type, (distributed.world(),))
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
            for name in module.parts:
                register_fsdp_forward_method(module, name)
    return fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextmanager
def exchange(model: nn.Module, last: bool) -> Iterator[None]:
    """Around one forward and backward pass: gradients are exchanged in the `last` one of an update."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if is_sharded(model):
        model.set_requires_gradient_sync(last)
    yield


def gradient_norm(model: nn.Module) -> Tensor:
    """The 2-norm of the whole gradient, over all parameters and ranks: a scalar, alike on every rank."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return _whole(nn.utils.get_total_norm(gradients))


def whole(values: Any, *, everywhere: bool = False) -> Any:
    """A nested state with its sharded tensors put together, on the CPU.

    everywhere: on every rank; else other ranks than the first get None in their place.
    Without sharded tensors: the values as they are.
    """
    if isinstance(values, DTensor):
        full = values.full_tensor()
        return full.cpu() if everywhere or distributed.is_main() else None
    if isinstance(values, dict):
        return {key: whole(value, everywhere=everywhere) for key, value in values.items()}
    if isinstance(values, list):
        return [whole(value, everywhere=everywhere) for value in values]
    return values


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """A whole state dict into a model, sharded or not."""
    own = model.state_dict()
    model.load_state_dict({name: _like(value, own.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """A whole optimiser state, its averages sharded as the parameters that they belong to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    averages = {
        number: {
            key: _like(value, parameters[number]) if value.ndim else value for key, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": averages})


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(value: Tensor, own: Tensor | None) -> Tensor:
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
