"""One process or many: `torchrun` says which through its environment."""

import os

import torch
import torch.distributed as dist


def start(device: str = "auto") -> torch.device:
    """Join the group that torchrun announces, if any; -> this process's device.

    gloo on the CPU, NCCL on GPUs. `device="auto"`: this rank's GPU where there is one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if "RANK" in os.environ:
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


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


def gather(value) -> list:
    """Every rank's value, in rank order, on every rank. Any picklable value."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values
