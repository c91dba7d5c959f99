"""The commands: train, test, predict, curves, check, shards, bench. What `tools/` and the scripts call."""

import argparse
import csv
import json
import random
import sys
import time
import traceback
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm import tqdm

from . import build
from .bench import commands as benchmarks
from .config import Config, ConfigError, make_parser, parse, resolve, to_dict
from .data.check import FileCheck, Finding, check_files, check_labels, summary
from .data.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES, DecodeError
from .data.write_shards import write_shards
from .engine import checkpoint as checkpoints
from .engine import distributed
from .engine.device import pick_precision, set_up
from .engine.evaluate import Shares, score, write_report
from .engine.logs import progress, read_log
from .engine.train import fit
from .errors import InputError
from .figures import draw_comparison
from .models.zoo import multiply_adds
from .recognizer import Recognizer, load_model
from .resume import check_resume, discard_run, find_run
from .weights import LoadReport


def command(function):
    """A command that tells what its user got wrong in one line and exits with code 2.

    A failure in a group of processes is printed, and ends this process at once.
    """

    def run(args: Sequence[str] | None = None) -> None:
        try:
            distributed.recorded(function)(sys.argv[1:] if args is None else args)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            distributed.leave(2)
        except KeyboardInterrupt:
            distributed.leave(130)
        except SystemExit as stop:
            distributed.leave(stop.code)
        except Exception:  # a bug: raised on, but in a group of processes nobody may wait for this one
            if not distributed.in_group():
                raise
            traceback.print_exc()
            distributed.leave(1)
        distributed.stop()

    run.__doc__ = function.__doc__
    run.__name__ = function.__name__
    return run


@command
def train(args: Sequence[str]) -> None:
    """Train a model, and validate it with one view as it goes."""
    parser = make_parser(train.__doc__)
    parser.add_argument("--resume", action="store_true", help="Continue the run in output, if any.")
    parser.add_argument("--overwrite", action="store_true", help="Start anew although output holds a run.")
    config, flags = parse(parser, args)
    config = resolve(config)
    device = _start(config)
    output = Path(config.output)
    last = output / checkpoints.LAST
    state, damage = find_run(output, resume=flags.resume, overwrite=flags.overwrite)

    job, weights = build.build_job(config, device, pretrained=state is None)
    if state is not None:
        check_resume(state, config, job, last)
    _make_folder(output)
    if distributed.is_main():
        if state is None:
            discard_run(output)
        (output / "config.yaml").write_text(yaml.safe_dump(job.details["config"], sort_keys=False))
        _introduce(config, job.model, job.task.outputs, device, weights)
        print(f"training on {len(job.train_loader.dataset)} videos x {config.data.repeats} clips", end="")
        print("" if job.val_loader is None else f", validating on {len(job.val_loader.dataset)}")
    distributed.barrier()  # every rank has read its checkpoint
    if distributed.is_main():
        checkpoints.tidy(output, last_is_damaged=damage is not None)
    best = fit(job, config.train, output=output, seed=config.seed, resume=state)
    if distributed.is_main():
        print(f"checkpoints: {' and '.join(dict.fromkeys(map(str, (best, last))))}")
        print(f"curves:      {output / 'curves.png'}")


@command
def test(args: Sequence[str]) -> None:
    """Score a checkpoint: every video once, its scores averaged over its views.

    A run's checkpoint says which model, sampling, image size and normalisation; the settings say which list
    and views, and where the report goes. With another project's weights (--model.weights) they say all.
    """
    parser = make_parser(test.__doc__)
    parser.add_argument("--checkpoint", metavar="FILE", help="A run's, to score; or give --model.weights.")
    config, flags = parse(parser, args)
    config = resolve(config)
    started = time.perf_counter()
    if flags.checkpoint is not None and "model.weights" in flags.asked:
        raise ConfigError("--checkpoint or --model.weights, not both: which of them is to be scored?")
    if flags.checkpoint is not None:
        own, class_names, model = load_model(flags.checkpoint)
        config = _with_checkpoint(config, own, flags.asked)
    elif config.model.weights is None:
        raise ConfigError("nothing to score: give --checkpoint FILE or --model.weights FILE")
    device = _start(config)
    output = Path(config.output)
    _make_folder(output)
    weights = None
    if flags.checkpoint is not None:
        rows, _ = build.read_split(config, "test", class_names)
    else:
        rows, class_names = build.read_split(config, "test")
        model = build.build_model(config, len(class_names))
        weights = build.load_pretrained(config, model, class_names, scoring=True)
    views = {"clips": config.eval.clips, "crops": config.eval.crops}
    task = build.build_task(config, class_names).to(device)
    loader = build.build_test_loader(config, task, rows, device, **views)
    source = str(flags.checkpoint or config.model.weights)
    if distributed.is_main():
        _introduce(config, model, task.outputs, device, weights)
        print(f"scoring {len(rows)} videos x {views['clips']} clips x {views['crops']} crops")
    precision, settings = pick_precision(config.train.precision, device), to_dict(config)
    for key in ("workers", "timeout", "keep"):  # change no score
        del settings["data"][key]
    scored = [
        source,
        _state_of(source),
        class_names,
        build.digest(rows),
        precision,
        *(settings[key] for key in ("task", "model", "data", "eval")),
    ]
    shares = Shares(output / "shares", scored)
    outcome = score(
        model.to(device),
        task,
        loader,
        device,
        precision=precision,
        shares=shares,
    )
    if outcome is None:  # another rank reports
        return
    details = {
        "on_failure": config.eval.on_failure,
        "checkpoint": source,
        "seconds": round(time.perf_counter() - started, 2),
    }
    lines = write_report(output, task, outcome, views=views, details=details)
    shares.discard()
    failed, rule = len(outcome.failures), {"wrong": "counted as wrong", "exclude": "left out"}
    note = f" ({rule[config.eval.on_failure]})" if failed else ""
    print(f"{len(rows)} videos x {views['clips']}x{views['crops']} views, {failed} unreadable{note}")
    print("\n".join(lines))


@command
def predict(args: Sequence[str]) -> None:
    """Print the five best classes of each video, with names and scores."""
    parser = argparse.ArgumentParser(description=predict.__doc__, allow_abbrev=False)
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="files, or folders of files")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="which model")
    parser.add_argument("--device", help="cpu, cuda, ...; default: CUDA where there is one")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for a video (60)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line and video")
    parser.add_argument("--features", metavar="FILE.npz", help="also save pooled features here")
    parser.add_argument("--maps", metavar="FOLDER", help="also draw what the semantic tokens look at")
    options = parser.parse_args(args)
    recognize = Recognizer(options.checkpoint, device=options.device, timeout=options.timeout)
    for folder in filter(None, (options.maps, options.features and Path(options.features).parent)):
        _make_folder(Path(folder))
    suffixes = VIDEO_SUFFIXES | (IMAGE_SUFFIXES if recognize.config.data.num_frames == 1 else set())
    paths = [path for name in options.videos for path in _videos(Path(name), suffixes)]
    features, failed = {}, 0
    for path in tqdm(paths, unit="video", disable=len(paths) < 10):
        try:
            guesses = recognize(path)
            if options.features:
                features[str(path)] = recognize.features(path).cpu().numpy()
            if options.maps:
                name = f"{path.absolute().parent.name}_{path.stem}.png"
                recognize.draw_semantic_maps(path, Path(options.maps, name))
        except DecodeError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
            if options.json:
                print(json.dumps({"path": str(path), "error": str(error)}))
            continue
        if options.json:
            found = [{"name": g.name, "score": round(g.score, 6)} for g in guesses]
            print(json.dumps({"path": str(path), "predictions": found}))
        else:
            print(path)
            for guess in guesses:
                print(f"  {guess.score:7.2%}  {guess.name}")
    if options.features:
        np.savez(options.features, **features)
    if failed:
        sys.exit(1)


@command
def curves(args: Sequence[str]) -> None:
    """Draw the learning curves of several runs into one picture."""
    parser = argparse.ArgumentParser(description=curves.__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's output folder; or NAME=FOLDER")
    parser.add_argument("--picture", required=True, metavar="FILE.png", help="where to")
    options = parser.parse_args(args)
    runs = {}
    for word in options.runs:
        name, _, folder = word.rpartition("=")
        log = Path(folder, "log.jsonl")
        if not log.is_file():
            raise InputError(f"{folder}: holds no run (no {log.name})")
        runs[name or Path(folder).name] = read_log(log)
    _make_folder(Path(options.picture).parent)
    draw_comparison(runs, Path(options.picture))
    print(options.picture)


@command
def check(args: Sequence[str]) -> None:
    """Check the lists of a config: files missing, unreadable, short or twice there, and wrong labels.

    Exit code 0: all is well; 1: problems, each a line of the csv; 2: settings or a list that make no sense.
    """
    parser = make_parser(check.__doc__)
    parser.add_argument("--thorough", action="store_true", help="Decode every frame, not only the first.")
    parser.add_argument("--csv", metavar="FILE", help="Where findings go; default: OUTPUT/check.csv.")
    config, flags = parse(parser, args)
    data = resolve(config).data
    splits, class_names, unknown = build.read_lists(resolve(config))
    path = Path(flags.csv or Path(config.output, "check.csv"))
    _make_folder(path.parent)
    findings = [Finding(split, "", "mislabelled", str(error)) for split, error in unknown.items()]
    findings += check_labels(splits, class_names)
    files = {row.path for rows in splits.values() for row in rows}
    with progress(total=len(files), desc="checking", unit="file") as bar:
        findings += check_files(
            splits,
            FileCheck(data.decoder, flags.thorough),
            workers=max(data.workers, 1),
            timeout=data.timeout,
            tick=bar.update,
        )
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(Finding._fields)
        writer.writerows(findings)
    print(summary(splits, findings))
    for finding in findings[:10]:
        print(f"{finding.kind}: {finding.cause}")
    if findings:
        print(f"{len(findings)} findings, all in {path}")
        sys.exit(1)
    print("all is well" if flags.thorough else "nothing found; --thorough decodes every frame")


@command
def shards(args: Sequence[str]) -> None:
    """Write a list's videos into WebDataset shards, with the class names beside them.

    Training videos are shuffled (by the seed), as lists are often sorted by class; others keep their order.
    """
    parser = make_parser(shards.__doc__)
    parser.add_argument("--split", choices=("train", "val", "test"), default="train", help="Which list.")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="Where to; must not exist.")
    parser.add_argument("--videos", type=int, default=1000, help="Videos of a shard, at most.")
    parser.add_argument("--megabytes", type=int, default=1000, help="Megabytes of a shard, at most.")
    config, flags = parse(parser, args)
    if min(flags.videos, flags.megabytes) < 1:
        raise ConfigError(f"--videos {flags.videos} --megabytes {flags.megabytes}: must be 1 or more")
    names = None
    if flags.split != "train" and config.data.train is not None:
        names = build.read_split(config, "train")[0].class_names
    rows, _ = build.read_split(config, flags.split, names)
    names, rows = rows.class_names, list(rows)
    if flags.split == "train":
        random.Random(config.seed).shuffle(rows)
    written = write_shards(
        rows, flags.to, class_names=names, videos=flags.videos, size=flags.megabytes * 1_000_000
    )
    size = sum(shard.stat().st_size for shard in written)
    print(
        f"{len(rows)} videos in {len(written)} shards, {size / 1e6:.1f} MB: --data.{flags.split} {flags.to}"
    )


@command
def bench(args: Sequence[str]) -> None:
    """Measure models, data loading, or accuracy against speed."""
    benchmarks.run(args)


def _videos(path: Path, suffixes: Collection[str]) -> list[Path]:
    """A file, the files with these suffixes in a folder, or else a folder of frames (one video)."""
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes)
    return [p for p in files if not p.name.startswith(".")] or [path]


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: no folder can be made there ({error.strerror})") from None


# What a checkpoint decides; the rest of `data` and all of `eval` is the scorer's.
_DATA_OF_CHECKPOINT = (
    "num_frames",
    "stride",
    "target_fps",
    "sampling",
    "image_size",
    "mean",
    "std",
)


def _with_checkpoint(config: Config, own: Config, asked: Collection[str]) -> Config:
    """The scorer's settings with the checkpoint's task, model, sampling and normalisation.

    asked: keys on the command line; one that says otherwise is an error.
    """
    if config.task != own.task and "task" in asked:
        raise ConfigError(f"--task {config.task}: the checkpoint was made with {own.task}")
    decided = [("model", field.name) for field in fields(own.model)]
    decided += [("data", key) for key in _DATA_OF_CHECKPOINT]
    for group, key in decided:
        ours, value = (getattr(getattr(c, group), key) for c in (config, own))
        if ours != value and f"{group}.{key}" in asked:
            raise ConfigError(f"--{group}.{key} {ours}: the checkpoint was made with {value}")
    data = replace(config.data, **{key: getattr(own.data, key) for key in _DATA_OF_CHECKPOINT})
    return replace(config, task=own.task, model=own.model, data=data)


def _start(config: Config) -> torch.device:
    """Join the other processes, if any; -> this one's device, set up."""
    device = distributed.start(config.device, config.data.timeout)
    if device.type == "cuda":
        set_up(config.train.matmul, benchmark=config.model.name.startswith("ptv_"))
    return device


def _introduce(
    config: Config,
    model: torch.nn.Module,
    outputs: int,
    device: torch.device,
    weights: LoadReport | None,
) -> None:
    """What computes, what is computed, and where its weights come from."""
    print(distributed.describe(device, pick_precision(config.train.precision, device)))
    cost = multiply_adds(model, num_frames=config.data.num_frames, image_size=config.data.image_size)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{config.model.name}: {parameters / 1e6:.2f} M parameters, {cost / 1e9:.3g} G multiply-adds "
        f"a view of {config.data.num_frames}x{config.data.image_size}x{config.data.image_size}, "
        f"{outputs} classes"
    )
    if weights is not None:
        print(weights)
        weights.write(Path(config.output, "weights.json"))


def _state_of(source: str) -> list[int] | None:
    """Size and time of a file: whether it is the one that an earlier scoring read."""
    path = Path(source)
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None
