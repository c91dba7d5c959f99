"""The benchmarks of `stvit-bench`: from the command line to a table, a csv and a picture.

Flags come first: what takes seconds to import waits until they are right.
"""

import argparse
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from ..config import Config, make_parser, parse, resolve
from ..engine.settings import LoopConfig
from ..errors import InputError, nearest
from ..figures import draw_speeds
from . import MODES, report

OUTPUT = "runs/bench"
SEPARATOR = re.compile(r",(?![^\[]*\]|[^:]*\]\])")  # a comma that stands in no brackets
COMPILE = ("default", "reduce-overhead", "max-autotune")
# How semantic tokens start ("merge1": with one semantic layer), and "pool": average pooling in their place,
# the control.
STARTS = {
    "merge": {"pool": "merge", "semantic_proportional": True},
    "merge1": {"pool": "merge", "semantic_proportional": True, "semantic_layers": 1},
    "grid": {"pool": "grid", "semantic_proportional": True},
    "avg": {"pool": "avg", "semantic_proportional": False},
    "max": {"pool": "max", "semantic_proportional": False},
    "pool": {"pool": "avg", "reducer": "pool"},
}


def run(args: Sequence[str]) -> None:
    """Dispatch on the first word. Raises InputError."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: stvit-bench {" + ",".join(BENCHMARKS) + "} ...   (each has --help)\n")
        for name, function in BENCHMARKS.items():
            print(f"  {name:<10}{function.__doc__}")
        return
    if args[0] not in BENCHMARKS:
        raise InputError(
            f"unknown benchmark {args[0]!r}{nearest(args[0], BENCHMARKS)}: one of {list(BENCHMARKS)}"
        )
    BENCHMARKS[args[0]](args[1:])


def model(args: Sequence[str]) -> None:
    """Clips/s, latency, peak memory and TFLOP/s of models, forward and training step."""
    parser = argparse.ArgumentParser(
        prog="stvit-bench model", description=model.__doc__, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--models", type=_models, required=True, help="a,b:SIZE=VALUE: ratios to the first")
    parser.add_argument("--batch", type=_numbers(1), default=[1, 8], help="clips a call: 1,8")
    parser.add_argument("--modes", type=_names(MODES), default=MODES, help="forward,training")
    parser.add_argument("--num-frames", type=_positive, default=16)
    parser.add_argument("--image-size", type=_size, default=224, help="pixels: 224, or HEIGHTxWIDTH")
    parser.add_argument("--num-classes", type=_positive, default=400)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--compile", choices=COMPILE, nargs="?", const="default", help="torch.compile, its mode"
    )
    parser.add_argument("--rounds", type=_positive, default=5, help="turns that the models take (5)")
    parser.add_argument(
        "--no-memory", action="store_true", help="leave peak memory out (so does --compile)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto: CUDA where there is one")
    parser.add_argument("--output", default=OUTPUT, metavar="FOLDER")
    try:
        options = parser.parse_args(args)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    import torch

    from ..engine import distributed
    from ..engine.device import set_up
    from ..models.zoo import create_model
    from .model import measure_memory, measure_models

    device, output = distributed.start(options.device), _folder(options.output)
    if device.type == "cuda":  # as in training
        set_up(LoopConfig.matmul)
    print(report.machine(device))
    clip = {"num_frames": options.num_frames, "image_size": options.image_size}
    sizes, dtype = {"num_classes": options.num_classes}, getattr(torch, options.dtype)
    try:
        variants = {word: _sized(word, sizes) for word in options.models}
        models = {word: create_model(name, **theirs, **clip) for word, (name, theirs) in variants.items()}
    except (TypeError, ValueError) as error:  # TypeError: a size that is a flag, too
        raise InputError(f"--models: {error}") from None
    rows = measure_models(
        models,
        **clip,
        batches=options.batch,
        modes=options.modes,
        dtype=dtype,
        compiled=options.compile,
        rounds=options.rounds,
        device=device,
    )
    del models
    for row in rows:
        case = clip | {"batch": row["batch"], "mode": row["mode"], "dtype": dtype, "device": device}
        skip = options.no_memory or options.compile  # what is compiled keeps other things
        row["peak MiB"] = None if skip else measure_memory(*variants[row["model"]], **case)
    draw_speeds(rows, output / "model.png")
    _finish(rows, output, "model")


def data(args: Sequence[str]) -> None:
    """How fast videos become clips: beside a bare decode, by stage, by number of workers."""
    parser = make_parser(data.__doc__)
    parser.add_argument(
        "--videos", nargs="+", default=[], metavar="FILE", help="Default: one rendered here."
    )
    parser.add_argument("--lists", action="store_true", help="The videos of the config's lists instead.")
    parser.add_argument("--workers", type=_numbers(0), default=[0, 1, 2], help="Loader processes: 0,1,2.")
    parser.add_argument("--rounds", type=_positive, default=5, help="Turns that all kinds of loading take.")
    parser.add_argument(
        "--feeding",
        nargs="+",
        default=[],
        metavar="LIST",
        help="Only what a sample of each list costs a worker.",
    )
    config, flags = parse(parser, args)
    from ..data.decode import open_video
    from .data import bench_data, bench_feeding, bench_views

    config, output = resolve(config), _output(config, args)
    if flags.feeding:
        print(report.machine("cpu"))
        print(report.write(bench_feeding(config, flags.feeding, rounds=flags.rounds), output, "feeding"))
        return
    if not flags.lists:
        config = replace(config, data=replace(config.data, train=None, val=None, test=None))
    for video in flags.videos:
        with open_video(video):  # what cannot be opened is told before the work
            pass
    print(report.machine("cpu"))
    case = {"videos": flags.videos, "rounds": flags.rounds}
    if not flags.lists:
        print(report.write(bench_views(config, **case), output, "views"))
    _finish(bench_data(config, **case, workers=flags.workers, output=output), output, "data")


def accuracy(args: Sequence[str]) -> None:
    """Accuracy of a config's ViT with each reducer and token budget, against its measured speed."""
    parser = make_parser(accuracy.__doc__)
    parser.add_argument(
        "--models",
        type=_names(),
        default="dense,semantic:4x3x3,semantic:4x2x2,semantic:2x2x2,pool:4x2x2,random:4x2x2,tome:4x2x2",
        help="dense, or REDUCER:TxHxW, with commas between; with settings: semantic:4x2x2:base_depth=3.",
    )
    parser.add_argument("--seeds", type=_numbers(0), default=[0, 1, 2], help="One run each: 0,1,2.")
    parser.add_argument("--rounds", type=_positive, default=20, help="Turns that the models take at speed.")
    parser.add_argument(
        "--beside", nargs="+", default=[], metavar="CSV", help="Tables of other runs, into the picture."
    )
    config, flags = parse(parser, args)
    config = resolve(config)
    from ..engine import distributed
    from .accuracy import TRADE, bench_accuracy

    device, output = distributed.start(config.device), _output(config, args)
    beside: dict[str, list[dict]] = {}
    for path in map(Path, flags.beside):
        title = path.absolute().parent.name
        if title in (*beside, output.name):
            raise InputError(f"--beside {path}: its folder names its panel, and another is called {title}")
        beside[title] = report.read(path, TRADE)
    print(report.machine(device))
    case = {"seeds": flags.seeds, "rounds": flags.rounds, "output": output, "device": device}
    case |= {"beside": beside}
    _finish(bench_accuracy(config, flags.models, **case), output, "accuracy")


def convert(args: Sequence[str]) -> None:
    """What is left of pretrained weights as semantic tokens' model, before training: classes that stay."""
    parser = make_parser(convert.__doc__)
    parser.add_argument("--base-depths", type=_numbers(0), default=[4, 6], help="Layers before: 4,6.")
    parser.add_argument(
        "--tokens",
        type=_tokens,
        default=[],
        help="TxHxW or HxW, with commas between; default: 3 of the grid.",
    )
    parser.add_argument("--starts", type=_names(STARTS), default=list(STARTS), help=",".join(STARTS))
    parser.add_argument("--also", type=_names(), default=[], help="More models, as accuracy's --models.")
    parser.add_argument("--limit", type=_positive, default=200, help="Videos or images of data.test (200).")
    config, flags = parse(parser, args)
    for key, value in (("model.weights", config.model.weights), ("data.test", config.data.test)):
        if value is None:
            raise InputError(f"--{key} is not set: what is to be converted, and what to look at")
    config = resolve(config)
    from ..engine import distributed
    from .convert import bench_convert

    device, output = distributed.start(config.device), _output(config, args)
    print(report.machine(device))
    rows = bench_convert(
        config,
        base_depths=flags.base_depths,
        tokens=flags.tokens,
        starts=flags.starts,
        also=flags.also,
        limit=flags.limit,
        output=output,
        device=device,
    )
    _finish(rows, output, "convert")


def step(args: Sequence[str]) -> None:
    """Segmenters with shared tokens and early exits: multiply-adds and images/s, beside the plain one."""
    parser = argparse.ArgumentParser(
        prog="stvit-bench step", description=step.__doc__, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        metavar="FILE",
        help="of segmenters, also FILE:SIZE=VALUE:...; else random weights",
    )
    parser.add_argument("--limit", type=_positive, default=40, help="images of the test list timed (40)")
    parser.add_argument("--model", type=_models, default=["vit_large_patch16_224"])
    parser.add_argument("--head", choices=("linear", "atm"), default="linear")
    parser.add_argument("--image-size", type=_positive, default=1024)
    parser.add_argument("--share", type=float, default=2.5, help="patches over tokens (2.5)")
    parser.add_argument("--leave", type=float, default=0.4, help="share that leaves at half depth (0.4)")
    parser.add_argument("--rounds", type=_positive, default=5, help="turns that the models take (5)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto: CUDA where there is one")
    parser.add_argument("--output", default=OUTPUT, metavar="FOLDER")
    try:
        options = parser.parse_args(args)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    from ..engine import distributed
    from ..engine.device import set_up
    from .step import bench_checkpoints, bench_step

    device, output = distributed.start(options.device), _folder(options.output)
    if device.type == "cuda":  # as in training
        set_up(LoopConfig.matmul)
    print(report.machine(device))
    case = {"rounds": options.rounds, "device": device}
    if options.checkpoints:
        from ..figures import draw_quality

        rows = bench_checkpoints(options.checkpoints, limit=options.limit, **case)
        draw_quality(rows, output / "step.png")
    else:
        case |= {"head": options.head, "share": options.share, "leave": options.leave}
        try:
            rows = bench_step(options.model[0], image_size=options.image_size, **case)
        except ValueError as error:
            raise InputError(f"--model {options.model[0]}: {error}") from None
    print(report.write(rows, output, "step"))
    if options.checkpoints:
        print(output / "step.png")


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


def _output(config: Config, args: Sequence[str]) -> Path:
    """Not the output of a config file, where a run may lie: only of the command line."""
    asked = any(word.partition("=")[0] == "--output" for word in args)
    return _folder(config.output if asked else OUTPUT)


# Types of flags. jsonargparse applies them to what they returned, too.


def _names(known: Collection[str] = ()) -> Callable[[str | list[str]], list[str]]:
    """Words with commas between (not those within brackets), each of `known` if there are any."""

    def parse(value: str | list[str]) -> list[str]:
        words = [word for word in SEPARATOR.split(value) if word] if isinstance(value, str) else value
        if value == []:  # a default
            return []
        if not words:
            raise ArgumentTypeError(f"{value!r}: nothing named")
        for word in words:
            if known and word.partition(":")[0] not in known:
                raise ArgumentTypeError(f"unknown {word!r}{nearest(word, known)}")
        return words

    return parse


def _sized(word: str, sizes: dict) -> tuple[str, dict]:
    """NAME:SIZE=VALUE:... -> a model's name and its sizes, with these. Raises ConfigError."""
    from .accuracy import setting

    name, *parts = word.split(":")
    return name, sizes | dict(setting(part, f"--models {word}") for part in parts)


def _models(value: str | list[str]) -> list[str]:
    from ..models.zoo import MODELS

    return _names(MODELS)(value)


def _numbers(least: int) -> Callable[[str | list[int]], list[int]]:
    def parse(value: str | list[int]) -> list[int]:
        words = _names()(value)
        if not all(str(word).isdecimal() and int(word) >= least for word in words):
            raise ArgumentTypeError(
                f"{value!r}: must be whole numbers from {least} up, commas between, as in 1,8"
            )
        return [int(word) for word in words]

    return parse


def _positive(value: str | int) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ArgumentTypeError(f"{value!r}: must be a whole number from 1 up")
    return int(value)


def _tokens(value: str | list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    sizes = []
    for word in _names()(value) if value else ():
        size = tuple(int(n) for n in word.split("x") if n.isdecimal()) if isinstance(word, str) else word
        size = (1, *size) if len(size) == 2 else size
        if len(size) != 3 or 0 in size:
            raise ArgumentTypeError(f"{word!r}: must be TxHxW or, of images, HxW, as in 7x7")
        sizes.append(size)
    return sizes


def _size(value: str) -> int | tuple[int, int]:
    """A side, or height and width."""
    sides = [_positive(side) for side in str(value).split("x")]
    if len(sides) > 2:
        raise ArgumentTypeError(f"{value!r}: must be a side, or height and width as in 800x1216")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


BENCHMARKS: dict[str, Callable[[Sequence[str]], None]] = {
    "model": model,
    "data": data,
    "accuracy": accuracy,
    "convert": convert,
    "step": step,
}
