"""The command test: scores of a list's videos."""

import time
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path

from .. import build
from ..config import Config, ConfigError, make_parser, parse, resolve, task_settings, to_dict
from ..engine import distributed
from ..engine.device import pick_precision
from ..engine.evaluate import Shares, score, write_report
from ..weights import Pixels
from .common import command, make_folder
from .training import introduce, start


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
        own, class_names, model = build.load_model(flags.checkpoint)
        config = _with_checkpoint(config, own, flags.asked)
        if "data.class_names" in flags.asked and build.read_names(config.data.class_names) != class_names:
            raise ConfigError(
                f"--data.class_names {config.data.class_names}: names other classes than the checkpoint's, "
                f"whose first is {class_names[0]!r}"
            )
    elif config.model.weights is None:
        raise ConfigError("nothing to score: give --checkpoint FILE or --model.weights FILE")
    device = start(config)
    output = Path(config.output)
    make_folder(output)
    weights = None
    if flags.checkpoint is not None:
        rows, _ = build.read_split(config, "test", class_names)
    else:
        rows, class_names = build.read_split(config, "test")
        config = build.with_model(config)
        model = build.build_model(config, len(class_names))
        weights = build.load_pretrained(config, model, class_names, scoring=True)
        config = build.with_pixels(config, weights)
        build.settle_superpatches(config, model)
        build.load_policy(config, model)
    views = {"clips": config.eval.clips, "crops": config.eval.crops}
    task = build.build_task(config, class_names)
    if config.task == "policy":  # whose teacher says what is right
        build.load_teacher(config, task, class_names, model)
    task.to(device)
    previews = _previews(config, len(rows))
    loader = build.build_test_loader(config, task, rows, device, **views, previews=previews)
    source = str(flags.checkpoint or config.model.weights)
    if distributed.is_main():
        introduce(config, model, task.outputs, device, weights)
        print(f"scoring {len(rows)} {task.items} x {views['clips']} clips x {views['crops']} crops")
    precision, settings = pick_precision(config.train.precision, device), to_dict(config)
    for key in ("workers", "prefetch", "timeout", "keep"):  # change no score
        del settings["data"][key]
    scored = [
        source,
        _state_of(source),
        class_names,
        build.digest(rows),
        precision,
        *(settings[key] for key in ("task", "model", "data", "eval")),
        task_settings(config),
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
    on_failure = getattr(task, "on_failure", config.eval.on_failure)
    details = {
        "on_failure": on_failure,
        "checkpoint": source,
        "seconds": round(time.perf_counter() - started, 2),
    }
    lines = write_report(output, task, outcome, views=views, details=details)
    shares.discard()
    failed, rule = len(outcome.failures), {"wrong": "counted as wrong", "exclude": "left out"}
    note = f" ({rule[on_failure]})" if failed else ""
    print(f"{len(rows)} {task.items} x {views['clips']}x{views['crops']} views, {failed} unreadable{note}")
    print("\n".join(lines))


PREVIEWED = 2000  # videos of a list, at most, whose report has previews by itself: 12 MB of them


def _previews(config: Config, videos: int) -> bool:
    return videos <= PREVIEWED if config.eval.previews == "auto" else config.eval.previews


# What a checkpoint decides; the rest of `data` and all of `eval` is the scorer's.
_DATA_OF_CHECKPOINT = (
    "num_frames",
    "stride",
    "target_fps",
    "sampling",
    "image_size",
    "short_side",
    *Pixels._fields,
    "hold_back",
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
        if ours not in (value, "auto") and f"{group}.{key}" in asked:
            raise ConfigError(f"--{group}.{key} {ours}: the checkpoint was made with {value}")
    data = replace(config.data, **{key: getattr(own.data, key) for key in _DATA_OF_CHECKPOINT})
    settings = {k: v for k, v in task_settings(own).items() if f"train.{k}" not in asked}
    train = replace(config.train, **settings)  # a longest side is one
    config = replace(config, task=own.task, model=own.model, data=data, train=train)
    return replace(config, seed=own.seed)  # holds the same back


def _state_of(source: str) -> list[int] | None:
    """Size and time of a file: whether it is the one that an earlier scoring read."""
    path = Path(source)
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None
