"""What a process computes on, and how precisely."""

import os
import sys
from pathlib import Path
from typing import Literal

import torch

from ..errors import InputError
from .settings import MatmulPrecision, Precision

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def pick_device(name: str = "auto") -> torch.device:
    """A device by name; "auto": CUDA where there is one; "cuda": this rank's. Raises InputError.

    "auto" does not mistake a GPU that torch cannot use for none: an error under torchrun, where a job would
    run on for days on the CPU, and else a warning.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and (cause := _unusable_gpus()):
            if "RANK" in os.environ:
                raise InputError(f"device=auto: {cause}; device=cpu chooses the CPU")
            print(f"warning: device=auto: {cause}; using the CPU", file=sys.stderr)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device={name}: {str(error).partition(chr(10))[0]}") from None
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"device={name}: there are {torch.cuda.device_count()} CUDA devices here")
    elif device.type != "cpu":
        try:  # known by name and not there, or without values (meta)
            torch.zeros(1, device=device).item()
        except Exception:  # each kind has its own
            raise InputError(f"device={name}: nothing that torch can compute on here") from None
    return device


def _unusable_gpus() -> str | None:
    """Why torch uses none of this machine's NVIDIA GPUs; None: there are none, or they are hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not _has_gpus():
        return None
    if torch.version.cuda is None:
        return f"this machine has NVIDIA GPUs, but torch {torch.__version__} is a build without CUDA"
    return (
        f"this machine has NVIDIA GPUs, but torch {torch.__version__} cannot use them: "
        f"the driver is probably too old for CUDA {torch.version.cuda}"
    )


def _has_gpus() -> bool:
    return Path("/proc/driver/nvidia").exists() or any(Path("/dev").glob("nvidia[0-9]*"))


def pick_precision(setting: Precision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """ "auto": fp32 on the CPU; on GPUs bf16, or fp16 on those that only emulate bf16 (before Ampere)."""
    if setting != "auto":
        return setting
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which matrix products and convolutions compute in `precision`; fp32: as without it."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def set_up(matmul: MatmulPrecision = "highest", *, benchmark: bool = False) -> None:
    """Process-wide speed of float32 arithmetic.

    matmul: of float32 matrix products; "high" and "medium" round their factors, on GPUs to TF32.
    benchmark: try cuDNN's algorithms for each new shape and keep the fastest: for convolutional models.
    """
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.benchmark = benchmark
