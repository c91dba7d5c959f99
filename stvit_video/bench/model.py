"""How fast models are, and what bounds them: everything is measured in turns, round by round.

So what disturbs the machine for a while disturbs all models alike, and ratios of medians hold. The
reference for the arithmetic is a large matrix product, timed in the same rounds.
"""

import copy
import gc
import itertools
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.transforms import Normalise
from ..engine.job import Job
from ..engine.logs import progress
from ..engine.run import Update
from ..engine.train import LoopConfig, start_run
from ..engine.uploads import Uploads
from ..models.embed import clip_size
from ..models.zoo import create_model, multiply_adds
from ..tasks.classification import Classification
from . import MODES

LATENCIES = 20  # single clips timed, at least, for a 95th percentile
SHORTEST = 0.1  # seconds of a round of one case: what is faster is called more often
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows and columns of the reference product


def measure_models(
    models: Mapping[str, nn.Module],
    *,
    num_frames: int,
    image_size: int | tuple[int, int],
    batches: Sequence[int],
    modes: Sequence[str] = MODES,
    dtype: torch.dtype = torch.float32,
    compiled: str | None = None,
    rounds: int = 5,
    device: torch.device,
) -> list[dict]:
    """Time every model at every batch size in every mode, in alternating order -> a row for each.

    Modes: "forward" (inference, weights in `dtype`), "training" (the trainer's own update, in autocast
    where `dtype` is bfloat16). compiled: a mode of torch.compile (of "forward"), None: eager.
    Figures: medians; `low` and `high` are the slowest and fastest round's clips/s; `ratio` is to the first
    model at the same batch and mode; `share` is of the measured rate of the matrix product.
    """
    cases = []
    for mode in modes:
        for batch in batches:
            for name, model in models.items():
                shape = (batch, 3, *clip_size(num_frames, image_size))
                call = _call(model, torch.randn(shape), mode, dtype, compiled, device)
                cases.append({"model": name, "batch": batch, "mode": mode, "call": call, "rounds": []})
    reference = _matrix_product(dtype, device)
    products: list[float] = []
    with progress(total=(rounds + 1) * len(cases), desc="timing", unit="case") as bar:
        for case in cases:  # the first calls compile and allocate
            seconds = [_timed(case["call"], device) for _ in range(3 if compiled else 2)][-1]
            least = LATENCIES / rounds if case["batch"] == 1 and case["mode"] == "forward" else 1
            case["calls"] = math.ceil(max(least, SHORTEST / seconds))
            bar.update()
        _timed(reference, device)
        for _ in range(rounds):
            for case in cases:
                case["rounds"].append([_timed(case["call"], device) for _ in range(case["calls"])])
                products.append(_timed(reference, device))
                bar.update()
    rate = 2 * MATRIX.get(device.type, MATRIX["cuda"]) ** 3 / statistics.median(products) / 1e12
    costs = {
        name: multiply_adds(model, num_frames=num_frames, image_size=image_size)
        for name, model in models.items()
    }
    rows = [_row(case, costs[case["model"]], rate) for case in cases]
    for row in rows:
        first = next(r for r in rows if (r["batch"], r["mode"]) == (row["batch"], row["mode"]))
        row["ratio"] = row["clips/s"] / first["clips/s"]
    return rows


def random_batch(size: int, num_frames: int, image_size: int | tuple[int, int], repeats: int = 1) -> Batch:
    """As a loader gives it: uint8 clips (B, V, 3, T, H, W), all of class 0."""
    shape = (size, repeats, 3, *clip_size(num_frames, image_size))
    clips = torch.randint(256, shape, dtype=torch.uint8)
    return Batch(torch.arange(size), clips, torch.zeros(size, repeats, dtype=torch.long))


def trainers_update(
    model: nn.Module, batch: Batch, device: torch.device, config: LoopConfig
) -> Callable[[], Update]:
    """What makes one update of the training loop with this batch: upload, normalisation, forward and
    backward pass, gradient norm, AdamW, and what the ranks agree on."""
    normalise = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    task = Classification(["0"], normalise=normalise).to(device)
    run = start_run(Job(task, model.to(device), device, None, None, {}), config, updates_an_epoch=1000)
    batch = batch.pin_memory() if device.type == "cuda" else batch
    uploads = Uploads(itertools.repeat(batch), device)  # the next one travels meanwhile, as in a run

    def update() -> Update:
        run.model.train()
        return run.make_update(task, uploads, 1, seed=0, prefetch=uploads.prefetch)

    return update


def _call(
    model: nn.Module, clips: Tensor, mode: str, dtype: torch.dtype, compiled: str | None, device
) -> Callable[[], object]:
    """What is timed. Training works on the model itself, forward on a copy where `dtype` is another."""
    if mode == "forward":
        clips = clips.to(device)
        if next(model.parameters()).dtype != dtype:
            model = copy.deepcopy(model).to(dtype)
        model, clips = model.to(device).eval(), clips.to(dtype)
        run = torch.compile(model, mode=compiled, dynamic=False) if compiled else model

        def forward() -> None:
            model.eval()
            with torch.inference_mode():
                run(clips)

        return forward

    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    config = LoopConfig(precision=precision, compile=compiled is not None, lr=1e-6)
    batch = random_batch(len(clips), clips.shape[2], tuple(clips.shape[3:]))
    return trainers_update(model, batch, device, config)


def _matrix_product(dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    size = MATRIX.get(device.type, MATRIX["cuda"])
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def _timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device has done it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def _row(case: dict, cost: int, rate: float) -> dict:
    """rate: of the matrix product, TFLOP/s."""
    batch, seconds = case["batch"], sorted(s for round in case["rounds"] for s in round)
    median = statistics.median(seconds)
    medians = [statistics.median(round) for round in case["rounds"]]
    passes = 1 if case["mode"] == "forward" else 3  # backward: products with inputs and with weights
    achieved = 2 * passes * cost * batch / median / 1e12
    return {
        "model": case["model"],
        "mode": case["mode"],
        "batch": batch,
        "clips/s": batch / median,
        "low": batch / max(medians),
        "high": batch / min(medians),
        "ms": 1000 * median,
        "ms p95": 1000 * seconds[math.ceil(0.95 * len(seconds)) - 1],
        "G multiply-adds": cost / 1e9,
        "TFLOP/s": achieved,
        "share": achieved / rate,
    }


def measure_memory(
    name: str, sizes: dict, *, device: torch.device, dtype: torch.dtype = torch.float32, **case
) -> float | None:
    """Peak memory in MiB of a new model with all that it needs: weights, activations, in training gradients
    and AdamW's moments. On CUDA what torch has allocated; elsewhere what a process of its own grows by
    (Linux only, else None), which is exact for models of many megabytes; None if that was killed.

    case: num_frames, image_size, batch, mode, as in `measure_models`."""
    case |= {"dtype": dtype, "device": device}
    if device.type == "cuda":
        return _peak(name, sizes, **case)
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_peak, name, sizes, **case).result()
        except BrokenProcessPool:
            killed = f"{name}, batch {case['batch']}, {case['mode']}: killed"
            print(f"{killed}, probably out of memory", file=sys.stderr)
            return None


def _peak(name, sizes, num_frames, image_size, batch, mode, dtype, device) -> float:
    cuda = device.type == "cuda"
    gc.collect()
    before = torch.cuda.memory_allocated(device) if cuda else _resident()
    model = create_model(name, num_frames=num_frames, image_size=image_size, **sizes)
    if mode == "forward":
        model = model.to(dtype)
    clips = torch.randn(batch, 3, *clip_size(num_frames, image_size))
    call = _call(model, clips, mode, dtype, None, device)
    torch.cuda.reset_peak_memory_stats(device) if cuda else _resident()  # making it does not count
    for _ in range(2):  # the second step has AdamW's moments, too
        call()
    after = torch.cuda.max_memory_allocated(device) if cuda else _most_resident()
    return (after - before) / 2**20


def _resident() -> int:
    """Bytes of this process in memory; forgets the most there were so far."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _most_resident() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
