"""What the command test does: scores of a list's videos."""

import time
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from torch import nn

from .. import build
from ..config import Config, ConfigError, DataConfig, refuse_idle_scoring, task_settings, to_dict
from ..data.rows import Row
from ..engine import distributed
from ..engine.device import pick_precision
from ..engine.evaluate import Shares, score, write_report
from ..engine.job import Outcome, Task
from ..pixels import Pixels
from ..tasks import TASKS
from .common import make_folder
from .training import introduce, start


def test(config: Config, flags: Namespace) -> None:
    """A list's scores and the report on them."""
    started = time.perf_counter()
    if flags.checkpoint is not None:
        config, class_names, model = _of_checkpoint(config, flags)
    refuse_idle_scoring(config)
    device = start(config)
    output = Path(config.output)
    make_folder(output)
    weights = None
    if flags.checkpoint is not None:
        rows, _ = build.read_split(config, "test", class_names)
    else:
        config = build.with_checked_model(config)
        rows, class_names = build.read_split(config, "test")
        model = build.build_model(config, len(class_names))
        weights = build.load_pretrained(config, model, class_names, scoring=True)
        config = build.with_pixels(config, weights)
        build.settle_superpatches(config, model)
        build.load_policy(config, model)
    if config.data.sampling == "middle":  # all clips would be the same one
        config = replace(config, eval=replace(config.eval, clips=1))
    views = {"clips": config.eval.clips, "crops": config.eval.crops}
    task = build.build_task(config, class_names)
    if config.task == "policy":  # whose teacher says what is right
        build.load_teacher(config, task, class_names, model)
    task.to(device)
    previews = _previews(config, len(rows))
    loader = build.build_test_loader(config, task, rows, device, **views, previews=previews)
    source = str(flags.checkpoint or config.model.weights)
    if distributed.is_main():
        introduce(config, model, task, device, weights)
        print(f"scoring {len(rows)} {task.items} x {views['clips']} clips x {views['crops']} crops")
    precision = pick_precision(config.train.precision, device)
    shares = Shares(output / "shares", _deciding(config, source, class_names, rows, precision))
    outcome = score(model.to(device), task, loader, device, precision=precision, shares=shares)
    if outcome is None:  # another rank reports
        return
    details = {
        "on_failure": getattr(task, "on_failure", config.eval.on_failure),
        "checkpoint": source,
        "seconds": round(time.perf_counter() - started, 2),
    }
    lines = write_report(output, task, outcome, views=views, details=details)
    shares.discard()
    print("\n".join([_summary(task, outcome, views, details["on_failure"]), *lines]))


def _of_checkpoint(config: Config, flags: Namespace) -> tuple[Config, list[str], nn.Module]:
    """The settings as the checkpoint decides them, its class names and its model. Raises ConfigError."""
    trained, class_names, model = build.load_model(flags.checkpoint)
    config = _with_checkpoint(config, trained, flags.asked)
    if "data.class_names" in flags.asked and build.read_names(config.data.class_names) != class_names:
        raise ConfigError(
            f"--data.class_names {config.data.class_names}: names other classes than the checkpoint's, "
            f"whose first is {class_names[0]!r}"
        )
    return config, class_names, model


def _deciding(
    config: Config, source: str, class_names: Sequence[str], rows: Sequence[Row], precision: str
) -> list:
    """What a scoring's records depend on: one that was broken off goes on where all of it is the same."""
    settings = to_dict(config)
    for key in ("workers", "prefetch", "timeout", "keep"):  # change no score
        del settings["data"][key]
    return [
        source,
        _state_of(config, source),
        class_names,
        build.digest(rows),
        [row.path for row in rows],  # a list may say other folders than before
        precision,
        *(settings[key] for key in ("task", "model", "data", "eval")),
        task_settings(config),
    ]


def _summary(task: Task, outcome: Outcome, views: Mapping[str, int], on_failure: str) -> str:
    """How many were scored by how many views, and what became of those that could not be read."""
    failed, rule = len(outcome.failures), {"wrong": "counted as wrong", "exclude": "left out"}
    note = f" ({rule[on_failure]})" if failed else ""
    number = f"{len(outcome.rows)} {task.items} x {views['clips']}x{views['crops']} views"
    return f"{number}, {failed} unreadable{note}"


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
    if config.seed != own.seed and "seed" in asked:
        raise ConfigError(f"--seed {config.seed}: the checkpoint was made with {own.seed}")
    decided = [("model", field.name) for field in fields(own.model)]
    decided += [("data", key) for key in _DATA_OF_CHECKPOINT]
    for group, key in decided:
        ours, value = (getattr(getattr(c, group), key) for c in (config, own))
        if ours not in (value, "auto") and f"{group}.{key}" in asked:
            raise ConfigError(f"--{group}.{key} {ours}: the checkpoint was made with {value}")
    data = replace(config.data, **{key: getattr(own.data, key) for key in _DATA_OF_CHECKPOINT})
    if data.ignore_label == DataConfig.ignore_label and "data.ignore_label" not in asked:
        data = replace(data, ignore_label=own.data.ignore_label)  # else what was ignored would be a class
    settings = {k: v for k, v in task_settings(own).items() if f"train.{k}" not in asked}
    train = replace(config.train, **settings)  # a longest side is one
    if config.task != own.task and TASKS[own.task].has_head:  # whose preset has one view
        views = {key: 1 for key in ("clips", "crops") if f"eval.{key}" not in asked}
        config = replace(config, eval=replace(config.eval, **views))
    config = replace(config, task=own.task, model=own.model, data=data, train=train)
    return replace(config, seed=own.seed)  # which rows are held back depends on it


def _state_of(config: Config, source: str) -> list[list[int] | None]:
    """Size and time of each file that scores depend on: whether an earlier scoring read the same ones."""
    names = (source, config.model.policy, config.train.teacher, config.eval.proposals)
    paths = (Path(name) if name and Path(name).exists() else None for name in names)
    return [path and [path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
