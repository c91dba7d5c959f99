"""One process or many: `torchrun` says which through its environment."""

import multiprocessing
import os
import sys
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore
from torch.distributed.rendezvous import rendezvous

from .device import DTYPE_NAMES, pick_device

# Long enough for one process to render the demo set or to write a checkpoint while the others wait. A
# process that died is noticed at once, by torchrun and by its closed connections.
TIMEOUT = timedelta(minutes=10)
SLOW_VIDEOS = 20


def start(device: str = "auto", patience: float | None = None) -> torch.device:
    """Join the group that torchrun announces, if any; -> this process's device.

    Tensors on the CPU, and all plain values, go through gloo, tensors on GPUs through NCCL.
    device: "auto" is this rank's GPU where there is one.
    patience: seconds that a video may take (`data.timeout`). A rank waits for the others 10 minutes and 20
        times as long, so that some hung videos in a row on one rank do not end the job.
    Raises InputError.
    """
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if "RANK" in os.environ:
        store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            store=PrefixStore(_attempt(), store),
            rank=rank,
            world_size=world,
            timeout=TIMEOUT + SLOW_VIDEOS * timedelta(seconds=patience or 0),
        )
    return chosen


def _attempt() -> str:
    """What tells this start of the processes from those before, under `torchrun --max-restarts`.

    torchrun's store outlives a restart, and so do the addresses of dead processes in it, which the new ones
    then call (pytorch issue 167288). On several nodes the count differs from node to node; there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun take a new store.
    """
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"


def stop() -> None:
    """Leave the group after a success, together with the other ranks; after a failure: `leave`."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Exit with `code`; in a group at once, without clean-up.

    To destroy the group waits for the other ranks, and they for this one in an exchange that it will never
    join. Closed connections and torchrun end them instead.
    """
    if not dist.is_initialized():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)


def in_group() -> bool:
    """Whether other processes may wait for this one."""
    return dist.is_initialized()


def describe(device: torch.device, precision: str) -> str:
    """One line for the start of a run: "device: NVIDIA H200 (cuda), bfloat16, 8 processes"."""
    name = f"{torch.cuda.get_device_name(device)} (cuda)" if device.type == "cuda" else device.type
    processes = "1 process" if world() == 1 else f"{world()} processes"
    return f"device: {name}, {DTYPE_NAMES[precision]}, {processes}"


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


def to_main(items: list) -> list:
    """The picklable items of all ranks, in rank order, on the main process; none on the others."""
    if not dist.is_initialized():
        return items
    parts = [None] * world() if is_main() else None
    dist.gather_object(items, parts)
    return [item for part in parts for item in part] if is_main() else []


def from_main(value: Any) -> Any:
    """The main process's value, on every rank. Any picklable value."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def sums(tensor: Tensor) -> None:
    """Sums over the ranks in place, the same on every rank: what ranks decide by, they decide alike.

    tensor: of any shape, on this rank's device, where it stays: the caller reads it once, with `tolist()`.
    """
    if dist.is_initialized():
        dist.all_reduce(tensor)
