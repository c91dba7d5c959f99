"""One model on several processes: DistributedDataParallel, or sharded by torch's `fully_shard` (FSDP2).

States go out and in whole, under the plain model's names: a checkpoint does not know how it was trained.
All functions here are collective: every rank calls them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError
from ..models.layers import Block
from . import distributed
from .settings import Parallel


def wrap(
    model: nn.Module,
    kind: Parallel,
    device: torch.device,
    *,
    precision: str = "fp32",
    compile: bool = False,
    backend: str | Callable = "inductor",
) -> nn.Module:
    """What to call in training. One process: the model itself. fsdp2 shards the model in place.

    precision: with "bf16", shards of fsdp2 are gathered in bfloat16 and gradients summed in float32; with
        "fp16" they are an InputError, as loss scaling does not know of shards.
    compile: by torch.compile, in place, once for each shape that comes: the model, or each block of shards.
    backend: torch.compile's.
    """
    sharded = kind == "fsdp2" and distributed.world() > 1
    if sharded and precision == "fp16":
        raise InputError(
            "train.parallel=fsdp2 and precision fp16: take ddp, or train.precision=fp32 or bf16"
        )
    if compile:
        for module in _blocks(model) if sharded else [model]:
            module.compile(dynamic=False, backend=backend)
    if distributed.world() == 1:
        return model
    if not sharded:
        return DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    buffers = distributed.kept_buffers(model)  # not sharded; shared as DistributedDataParallel does
    model.register_forward_pre_hook(lambda *_: distributed.share(buffers))
    return shard(model, device, precision=precision)


def shard(model: nn.Module, device: torch.device, *, precision: str = "fp32") -> nn.Module:
    """Each `Block` is gathered for its turn and let go again; what is outside of blocks stays together."""
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (distributed.world(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
        for name in block.parts:
            register_fsdp_forward_method(block, name)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def _blocks(model: nn.Module) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


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
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


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
    """A complete state dict into a model, sharded or not."""
    targets = model.state_dict()
    model.load_state_dict({name: _like(value, targets.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """A complete optimiser state, its averages sharded as the parameters that they belong to.

    All are copies: nothing of `state` is held on to. Which kernels compute is this optimiser's choice, not
    that of the one, perhaps on another device, whose state it is.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    averages = {
        number: {
            key: _like(value, parameters[number]).clone() if value.ndim else value.clone()
            for key, value in values.items()
        }
        for number, values in state["state"].items()
    }
    groups = [
        theirs | {key: ours[key] for key in ("fused", "foreach") if key in ours}
        for theirs, ours in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": averages, "param_groups": groups})


def _like(value: Tensor, target: Tensor | None) -> Tensor:
    """`value` on the target's device, and sharded like it."""
    if not isinstance(target, DTensor):
        return value if target is None else value.to(target.device)
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
