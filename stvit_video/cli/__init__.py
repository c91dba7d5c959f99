"""The commands, which `tools/` and the scripts `stvit-...` call: here the flags of each.

What does the work is named beside `command`, is imported once the flags are right, and called with what the
function here returns: imports take seconds, which --help and a wrong flag need not wait for.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from .common import command

TOLERANCE = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.2}  # of `export`: largest difference of a probability


@command("cli.training.train")
def train(args: Sequence[str]) -> tuple:
    """Train a model, and validate it with one view as it goes."""
    from ..config import ConfigError, make_parser, parse, resolve

    parser = make_parser(train.__doc__)
    parser.add_argument("--resume", action="store_true", help="Continue the run in output, if any.")
    parser.add_argument("--overwrite", action="store_true", help="Start anew although output holds a run.")
    config, flags = parse(parser, args)
    if flags.resume and flags.overwrite:
        raise ConfigError("--resume or --overwrite, not both: is the run in output to go on, or to go?")
    return resolve(config), flags


@command("cli.scoring.test")
def test(args: Sequence[str]) -> tuple:
    """Score a checkpoint: every video once, its scores averaged over its views.

    A run's checkpoint says which model, sampling, image size and normalisation; the settings say which list
    and views, and where the report goes. With another project's weights (--model.weights) they say all.
    """
    from ..config import ConfigError, make_parser, parse, resolve

    parser = make_parser(test.__doc__)
    parser.add_argument("--checkpoint", metavar="FILE", help="A run's, to score; or give --model.weights.")
    config, flags = parse(parser, args)
    if flags.checkpoint is not None and "model.weights" in flags.asked:
        raise ConfigError("--checkpoint or --model.weights, not both: which of them is to be scored?")
    if flags.checkpoint is None and config.model.weights is None:
        raise ConfigError("nothing to score: give --checkpoint FILE or --model.weights FILE")
    return resolve(config), flags


@command("cli.lists.check")
def check(args: Sequence[str]) -> tuple:
    """Check the lists of a config: files missing, unreadable, short or twice there, and wrong labels.

    Exit code 0: all is well; 1: problems, each a line of the csv; 2: settings or a list that make no sense.
    """
    from ..config import make_parser, parse, resolve

    parser = make_parser(check.__doc__)
    parser.add_argument("--thorough", action="store_true", help="Decode every frame, not only the first.")
    parser.add_argument("--csv", metavar="FILE", help="Where findings go; default: OUTPUT/check.csv.")
    parser.add_argument(
        "--write-clean",
        metavar="LIST",
        help="Write what nothing is wrong with as a list, of one list only.",
    )
    config, flags = parse(parser, args)
    return resolve(config), flags


@command("cli.lists.shards")
def shards(args: Sequence[str]) -> tuple:
    """Write a list's videos into WebDataset shards, with the class names beside them.

    Training videos are shuffled (by the seed), as lists are often sorted by class; others keep their order.
    data.workers processes read, and give a video up after data.timeout seconds. Broken off, the same
    command goes on. Exit code 1: some videos cannot be read; they are left out, and in unreadable.csv.
    """
    from ..config import make_parser, parse

    parser = make_parser(shards.__doc__)
    parser.add_argument("--split", choices=("train", "val", "test"), default="train", help="Which list.")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="Where to; a new folder.")
    parser.add_argument("--videos", type=int, default=1000, help="Videos of a shard, at most.")
    parser.add_argument(
        "--megabytes", type=int, default=1000, help="Of the list's files to a shard, at most."
    )
    parser.add_argument("--frames", choices=("jpeg",), help="Store videos as frames. Default: as they are.")
    parser.add_argument("--recode", choices=("h264",), help="Encode videos again.")
    parser.add_argument(
        "--short-side",
        type=int | None,
        default=256,
        help="Larger frames are made smaller to this; null: none are.",
    )
    parser.add_argument("--quality", type=int, default=85, help="Of --frames jpeg, 1 to 100.")
    parser.add_argument("--every", type=int, default=1, help="Of --frames: keep every so many frames one.")
    parser.add_argument(
        "--gop", type=int, default=16, help="Of --recode: a key frame every so many frames."
    )
    parser.add_argument(
        "--crf", type=int, default=23, help="Of --recode: quality, from 0 (the best) to 51."
    )
    parser.add_argument("--tune", choices=("fastdecode", "none"), default="fastdecode", help="Of --recode.")
    config, flags = parse(parser, args)
    return config, flags


@command("cli.prediction.predict")
def predict(args: Sequence[str]) -> tuple:
    """Print the five best classes of each video, with names and scores; or write what happens when.

    With a checkpoint of another task: a line of json of each image and of each frame of a video.
    """
    from ..timeline import ENTER, EVERY, LEAVE

    parser = ArgumentParser(description=predict.__doc__, allow_abbrev=False)
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="files, lists, folders, or shards")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="which model")
    parser.add_argument("--device", help="cpu, cuda, ...; default: CUDA where there is one")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for a video (60)")
    parser.add_argument("--workers", type=int, default=4, help="videos decoded at a time (4)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line and video")
    parser.add_argument("--features", metavar="FILE.npz", help="also save pooled features here")
    parser.add_argument("--maps", metavar="FOLDER", help="draw superpatches and semantic tokens here")
    timeline = any(word.partition("=")[0] == "--timeline" for word in args)
    parser.add_argument(
        "--draw",
        **({"action": "store_true"} if timeline else {"metavar": "FOLDER"}),
        help="write images and videos here, objects or other predictions drawn in; with --timeline, "
        "without FOLDER: also NAME.mp4, labels drawn into the frames",
    )
    long = parser.add_argument_group("timelines of long videos")
    long.add_argument(
        "--timeline",
        metavar="FOLDER",
        help="write NAME.csv, .json, .npz, .png and .vtt of each video here; killed, it goes on",
    )
    long.add_argument("--every", type=float, default=EVERY, metavar="SECONDS", help="step (2)")
    long.add_argument("--window", type=float, metavar="SECONDS", help="length (the checkpoint's clips')")
    long.add_argument("--enter", type=float, default=ENTER, help="score at which a class begins (0.5)")
    long.add_argument("--leave", type=float, default=LEAVE, help="score below which it ends (0.3)")
    people = parser.add_argument_group("what each person does")
    people.add_argument(
        "--actions", metavar="FOLDER", help="write NAME.csv and NAME.mp4 of each video here"
    )
    people.add_argument(
        "--proposals", metavar="FILE.csv", help="people's boxes at key frames, as AVA's csv"
    )
    people.add_argument(
        "--detector", metavar="FILE", help="weights of torchvision's fasterrcnn_resnet50_fpn: find people"
    )
    options = parser.parse_args(args)
    _check_predict(parser, options)
    return (options,)


def _check_predict(parser: ArgumentParser, options: Namespace) -> None:
    """Exit with a line for settings that make no sense."""
    for name in ("every", "window", "timeout", "workers"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name} {value}: must be more than 0")
    if not 0 <= options.leave <= options.enter <= 1:
        parser.error(f"--enter {options.enter} --leave {options.leave}: must be 0 <= leave <= enter <= 1")
    if options.features and Path(options.features).suffix != ".npz":
        parser.error(f"--features {options.features}: must end in .npz")
    if options.actions and not bool(options.proposals) ^ bool(options.detector):
        parser.error("--actions needs --proposals FILE.csv or --detector FILE, one of them")
    if not options.actions and (options.proposals or options.detector):
        parser.error("--proposals and --detector need --actions FOLDER")
    for mode, others in (("actions", ("timeline",)), ("timeline", ())):
        for name in ("json", "features", "maps", *others):
            if getattr(options, mode) and getattr(options, name):
                parser.error(f"--{name} is not written with --{mode} FOLDER: two commands")


@command("cli.pictures.curves")
def curves(args: Sequence[str]) -> tuple:
    """Draw the learning curves of several runs into one picture."""
    parser = ArgumentParser(description=curves.__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's output folder; or NAME=FOLDER")
    parser.add_argument("--picture", required=True, metavar="FILE.png", help="where to")
    return (parser.parse_args(args),)


@command("cli.pictures.compare")
def compare(args: Sequence[str]) -> tuple:
    """Compare scorings of the same videos on one page: figures with intervals, tests, where they differ."""
    parser = ArgumentParser(description=compare.__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a scoring's output folder; or NAME=FOLDER")
    parser.add_argument("--to", required=True, metavar="FILE.html", help="where to")
    parser.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap (10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    return (parser.parse_args(args),)


@command("bench.commands.run")
def bench(args: Sequence[str]) -> tuple:
    """Measure models, data loading, or accuracy against speed."""
    return (args,)


@command("cli.serving.page")
def page(args: Sequence[str]) -> tuple:
    """Open a page on this machine: drop a video, see its classes, its timeline and what the tokens took."""
    parser = ArgumentParser(description=page.__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="which model")
    parser.add_argument("--device", help="cpu, cuda, ...; default: CUDA where there is one")
    parser.add_argument("--host", default="127.0.0.1", help="who may come (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="(7860)")
    parser.add_argument(
        "--examples", metavar="FOLDER", help="videos to choose; default: the validation list's"
    )
    parser.add_argument("--max-megabytes", type=float, default=200, help="of an upload (200)")
    parser.add_argument("--max-seconds", type=float, default=600, help="that a video may last (600)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for a video (60)")
    options = parser.parse_args(args)
    for name in ("max_megabytes", "max_seconds", "timeout"):
        if not 0 < getattr(options, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be more than 0")
    if not 0 < options.port < 1 << 16:
        parser.error(f"--port {options.port}: must be from 1 to 65535")
    return (options,)


@command("cli.ensembling.ensemble")
def ensemble(args: Sequence[str]) -> tuple:
    """Average the scores of several scorings over all their views, and report as stvit-test does.

    Each was made with --eval.dump_views true, of the same videos and classes: by other checkpoints, or by
    one with other views. Every view counts the same. A video that some could not read has the others'.
    """
    parser = ArgumentParser(description=ensemble.__doc__, allow_abbrev=False)
    parser.add_argument(
        "dumps", nargs="+", metavar="DUMP", help="a views.npz, or a scoring's output folder"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the report goes")
    return (parser.parse_args(args),)


@command("cli.exporting.export")
def export(args: Sequence[str]) -> tuple:
    """Write a checkpoint's model as one ONNX or .pt2 file, and compare the scores of both on real clips.

    Exit code 0: they agree; 1: they do not, and nothing is written; 2: it cannot be exported or read.
    """
    parser = ArgumentParser(description=export.__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="which model")
    parser.add_argument("--to", required=True, metavar="FILE", help="where to: NAME.onnx or NAME.pt2")
    parser.add_argument("--precision", choices=TOLERANCE, default="fp32", help="of the weights (fp32)")
    parser.add_argument("--videos", nargs="+", metavar="VIDEO", help="compare on these, not on its list")
    parser.add_argument("--clips", type=int, default=16, help="clips to compare at most (16)")
    bounds = ", ".join(f"{name} {bound:g}" for name, bound in TOLERANCE.items())
    parser.add_argument("--tolerance", type=float, help=f"largest difference of a probability ({bounds})")
    parser.add_argument("--time", type=int, default=0, metavar="N", help="also time N clips, one by one")
    return (parser.parse_args(args),)
