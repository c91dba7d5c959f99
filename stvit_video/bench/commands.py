"""The three benchmarks of `stvit-bench`: from the command line to a table, a csv and a picture."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..config import Config, make_parser, parse, resolve
from ..data.decode import open_video
from ..engine import distributed
from ..errors import InputError, nearest
from ..figures import draw_speeds
from ..models.zoo import MODELS, create_model
from . import report
from .accuracy import bench_accuracy
from .data import bench_data, bench_views
from .model import MODES, measure_memory, measure_models

OUTPUT = "runs/bench"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMPILE = ("default", "reduce-overhead", "max-autotune")


def run(args: Sequence[str]) -> None:
    """Dispatch on the first word. Raises InputError."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: stvit-bench {" + ",".join(KINDS) + "} ...   (each has --help)\n")
        for name, function in KINDS.items():
            print(f"  {name:<10}{function.__doc__}")
        return
    if args[0] not in KINDS:
        raise InputError(f"unknown benchmark {args[0]!r}{nearest(args[0], KINDS)}: one of {list(KINDS)}")
    KINDS[args[0]](args[1:])


def model(args: Sequence[str]) -> None:
    """Clips/s, latency, peak memory and TFLOP/s of models, forward and training step."""
    parser = argparse.ArgumentParser(
        prog="stvit-bench model", description=model.__doc__, allow_abbrev=False
    )
    parser.add_argument("--models", required=True, help="a,b,c: ratios are to the first")
    parser.add_argument("--batch", default="1,8", help="clips a call: 1,8")
    parser.add_argument("--modes", default=",".join(MODES), help="forward,training")
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--num-classes", type=int, default=400)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--compile", choices=COMPILE, nargs="?", const="default", help="torch.compile, its mode"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns that the models take (5)")
    parser.add_argument(
        "--no-memory", action="store_true", help="leave peak memory out (so does --compile)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto: CUDA where there is one")
    parser.add_argument("--output", default=OUTPUT, metavar="FOLDER")
    options = parser.parse_args(args)
    names, modes = _words("--models", options.models), _words("--modes", options.modes)
    batches = _numbers("--batch", options.batch, 1)
    for name in names:
        if name not in MODELS:
            raise InputError(f"--models: unknown model {name!r}{nearest(name, MODELS)}")
    for mode in modes:
        if mode not in MODES:
            raise InputError(f"--modes: {mode!r} is none of {list(MODES)}")
    if min(options.num_frames, options.image_size, options.num_classes) < 1:
        raise InputError("--num-frames, --image-size and --num-classes must be 1 or more")
    device, output = distributed.start(options.device), _folder(options.output)
    print(report.machine(device))
    clip = {"num_frames": options.num_frames, "image_size": options.image_size}
    sizes = {"num_classes": options.num_classes}
    dtype = DTYPES[options.dtype]
    try:
        models = {name: create_model(name, **sizes, **clip) for name in names}
    except ValueError as error:
        raise InputError(f"--models: {error}") from None
    rows = measure_models(
        models,
        **clip,
        batches=batches,
        modes=modes,
        dtype=dtype,
        compiled=options.compile,
        rounds=_rounds(options.rounds),
        device=device,
    )
    del models
    for row in rows:
        name, batch, mode = row["model"], row["batch"], row["mode"]
        row["peak MiB"] = None
        if not options.no_memory and not options.compile:  # what is compiled keeps other things
            case = clip | {"batch": batch, "mode": mode, "dtype": dtype, "device": device}
            row["peak MiB"] = measure_memory(name, sizes, **case)
    draw_speeds(rows, output / "model.png")
    _finish(rows, output, "model")


def data(args: Sequence[str]) -> None:
    """How fast videos become clips: beside a bare decode, by stage, by number of workers."""
    parser = make_parser(data.__doc__)
    parser.add_argument(
        "--videos", nargs="+", default=[], metavar="FILE", help="Default: one rendered here."
    )
    parser.add_argument("--lists", action="store_true", help="The videos of the config's lists instead.")
    parser.add_argument("--workers", type=str, default="0,1,2", help="Numbers of loader processes.")
    parser.add_argument("--rounds", type=int, default=5, help="Turns that all kinds of loading take.")
    config, flags = parse(parser, args)
    config = resolve(config)
    if not flags.lists:
        config = replace(config, data=replace(config.data, train=None, val=None, test=None))
    output, workers = _output(config, args), _numbers("--workers", flags.workers, 0)
    rounds = _rounds(flags.rounds)
    for video in flags.videos:
        with open_video(video):  # what cannot be opened is told before the work
            pass
    print(report.machine(torch.device("cpu")))
    if not flags.lists:
        rows = bench_views(config, videos=flags.videos, rounds=rounds)
        print(report.write(rows, output, "views"))
    rows = bench_data(config, videos=flags.videos, workers=workers, rounds=rounds, output=output)
    _finish(rows, output, "data")


def accuracy(args: Sequence[str]) -> None:
    """Accuracy of a config's ViT with each reducer and token budget, against its measured speed."""
    parser = make_parser(accuracy.__doc__)
    parser.add_argument(
        "--models",
        type=str,
        default="dense,semantic:4x3x3,semantic:4x2x2,semantic:2x2x2,pool:4x2x2,random:4x2x2,tome:4x2x2",
        help="dense, or REDUCER:TxHxW, with commas between.",
    )
    parser.add_argument("--seeds", type=str, default="0,1,2", help="One run each, with commas between.")
    parser.add_argument("--rounds", type=int, default=20, help="Turns that the models take at speed.")
    config, flags = parse(parser, args)
    config = resolve(config)
    models, seeds = _words("--models", flags.models), _numbers("--seeds", flags.seeds, 0)
    device, output = distributed.start(config.device), _output(config, args)
    print(report.machine(device))
    rows = bench_accuracy(
        config,
        models,
        seeds=seeds,
        rounds=_rounds(flags.rounds),
        output=output,
        device=device,
    )
    _finish(rows, output, "accuracy")


def _finish(rows: Sequence[dict], output: Path, name: str) -> None:
    path = report.write(rows, output, name)
    print(f"{path}, {path.with_suffix('.png')}")


def _folder(name: str) -> Path:
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: no folder can be made there ({error.strerror})") from None
    return path


def _words(flag: str, text: str) -> list[str]:
    words = [word for word in text.split(",") if word]
    if not words:
        raise InputError(f"{flag} {text!r}: nothing named")
    return words


def _numbers(flag: str, text: str, least: int) -> list[int]:
    words = _words(flag, text)
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise InputError(
            f"{flag} {text!r}: must be whole numbers from {least} up, commas between, as in 1,8"
        )
    return [int(word) for word in words]


def _rounds(value: int) -> int:
    if value < 1:
        raise InputError(f"--rounds {value}: must be 1 or more")
    return value


def _output(config: Config, args: Sequence[str]) -> Path:
    """Not the output of a config file, where a run may lie: only of the command line."""
    asked = any(word.partition("=")[0] == "--output" for word in args)
    return _folder(config.output if asked else OUTPUT)


KINDS: dict[str, Callable[[Sequence[str]], None]] = {"model": model, "data": data, "accuracy": accuracy}
