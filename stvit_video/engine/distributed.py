"""One process or many: `torchrun` says which through its environment."""

import os
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import InputError

# A process that waits longer for the others gives up. Long enough for one of them to render the demo set or
# to write a checkpoint; a process that died is noticed at once, by torchrun and by its closed connections.
TIMEOUT = timedelta(minutes=10)


def start(device: str = "auto") -> torch.device:
    """Join the group that torchrun announces, if any; -> this process's device.

    gloo on the CPU, NCCL on GPUs. `device="auto"`: this rank's GPU where there is one.
    """
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    return chosen


def pick_device(name: str = "auto") -> torch.device:
    """A device by name; "auto": CUDA where there is one; "cuda": this rank's. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device={name}: {str(error).partition(chr(10))[0]}") from None
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"device={name}: there are {torch.cuda.device_count()} CUDA devices here")
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def kept_buffers(model: torch.nn.Module) -> list[torch.Tensor]:
    """Buffers that a checkpoint holds: BatchNorm's statistics, each rank's own in training; no tables."""
    kept = model.state_dict().keys()
    return [buffer for name, buffer in model.named_buffers() if name in kept]


def share(tensors: Iterable[torch.Tensor]) -> None:
    """Rank 0's values, in every rank's tensors."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def gather(value) -> list:
    """Every rank's value, in rank order, on every rank. Any picklable value."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def to_main(items: list) -> list:
    """The items of all ranks, in rank order, on the main process; none on the others."""
    parts = gather(items)
    return [item for part in parts for item in part] if is_main() else []


def total(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums over the ranks, the same on every rank: what ranks decide by, they decide alike."""
    if not dist.is_initialized():
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()
