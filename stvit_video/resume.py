"""Going on with a run that was broken off: which checkpoint, and whether the settings allow it."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import Config, ConfigError, to_dict, upgrade
from .engine import checkpoint, distributed
from .engine.job import Job

# What may differ between the parts of a resumed run: it changes neither model nor updates.
FREE_TO_CHANGE = (
    *("weights", "inflate", "fresh", "policy"),
    *("root", "val", "test", "format", "workers", "prefetch", "timeout", "keep", "max_unreadable"),
    *(
        "eval_every",
        "log_every",
        "max_nonfinite",
        "checkpoint_minutes",
        "keep_every",
        "parallel",
        "compile",
    ),
    *("batch_size", "accumulate"),  # their product with the number of ranks may not
)


def find_run(output: Path, *, resume: bool, overwrite: bool) -> tuple[dict | None, Exception | None]:
    """The checkpoint to continue, None to start anew; and what is wrong with a newer one.

    Raises ConfigError where `output` holds a run and neither was asked for, CheckpointError where no
    checkpoint of it can be read.
    """
    held = [name for name in checkpoint.NAMES if (output / name).exists()]
    if held and not (resume or overwrite):
        raise ConfigError(f"output={output} holds a run: --resume continues it, --overwrite discards it")
    if not resume:
        return None, None
    state, damage = checkpoint.load_last(output)
    if state is None and held:
        raise ConfigError(f"output={output} holds {held[0]} but no {checkpoint.LAST} to continue")
    if distributed.is_main():
        if damage is not None:
            print(f"warning: {damage}; continuing the one before", file=sys.stderr)
        told = (
            "no run there yet, starting" if state is None else f"continuing after update {state['update']}"
        )
        print(f"{output}: {told}")
    return state, damage


def discard_run(output: Path) -> None:
    """What a former run left in `output` must not pass for this one's."""
    held = any((output / name).exists() for name in checkpoint.NAMES)  # else they are another scoring's
    reports = ("report.json", "report.html", "predictions.csv") if held else ()
    left = (
        *reports,
        *checkpoint.NAMES,
        checkpoint.DAMAGED,
        "weights.json",
        "unreadable.csv",
        "nonfinite.csv",
    )
    kept = (path.name for path in output.glob(checkpoint.KEPT.replace("{:04}", "[0-9]*")))
    for name in (*left, *kept, "curves.png"):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / "tensorboard", ignore_errors=True)


def model_of_run(config: Config, state: dict[str, Any]) -> Config:
    """What the run's weights decided, which may be gone, where none is set: `model.superpatch_std`, and
    with `model.name: auto` the name and the sizes."""
    sizes = state["config"]["model"] if config.model.name == "auto" else {}
    before = {
        k: v for k, v in (sizes | _built_std(state)).items() if getattr(config.model, k, None) == "auto"
    }
    return replace(config, model=replace(config.model, **before))


def _built_std(state: dict[str, Any]) -> dict[str, Any]:
    """`superpatch_std` as the run's model has it: its settings may say auto."""
    return {k: v for k, v in state.get("built", {}).items() if k == "superpatch_std"}


def check_resume(state: dict[str, Any], config: Config, job: Job, path: Path) -> None:
    """A run goes on only as it began: the same task, classes, model, data, recipe, seed and updates.

    job: what is to go on. Raises ConfigError.
    """
    before, now, run = upgrade(state["config"]), to_dict(config), job.details["run"]
    before["model"] = before["model"] | _built_std(state)
    if before.get("task", "classification") != config.task:
        raise ConfigError(f"{path}: began with task={before['task']}, cannot go on with {config.task}")
    for key in ("seed", "videos"):
        if run[key] != state["run"][key]:
            raise ConfigError(f"{path}: began with {key}={state['run'][key]}, cannot go on with {run[key]}")
    if state["run"].get("list", run["list"]) != run["list"]:
        raise ConfigError(f"{path}: began with other videos or labels than data.train={config.data.train}")
    if state["class_names"] != job.details["class_names"]:
        raise ConfigError(f"{path}: its class names are not those of data.train={config.data.train}")
    moved = ("train", "class_names", "labels") if "list" in state["run"] else ()  # the same list elsewhere
    for group in ("model", "data", "train"):
        for key, value in before[group].items():
            free = key in FREE_TO_CHANGE or (group == "data" and key in moved)
            if not free and now[group].get(key) != value:
                raise ConfigError(
                    f"{path}: began with {group}.{key}={value}, cannot go on with {now[group].get(key)}"
                )
    _check_updates(before["train"], state, config, job, path)


def _check_updates(
    before: dict[str, Any], state: dict[str, Any], config: Config, job: Job, path: Path
) -> None:
    """Another number of ranks, batch size or accumulation is well where an update has as many videos."""
    shapes = [
        (before["batch_size"], before["accumulate"], state["run"]["ranks"]),
        (config.train.batch_size, config.train.accumulate, distributed.world()),
    ]
    sizes = [batch * accumulate * ranks for batch, accumulate, ranks in shapes]
    was, now = ("train.batch_size {} x train.accumulate {} x {} ranks".format(*shape) for shape in shapes)
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{path}: began with {sizes[0]} videos an update ({was}), cannot go on with {sizes[1]} ({now})"
        )
    updates = config.train.epochs * (len(job.train_loader) // config.train.accumulate)
    schedule = state["schedule"]  # "steps" does not know its end
    planned = schedule["t_initial"] + schedule["warmup_t"] if "t_initial" in schedule else updates
    if planned != updates:  # version 0.2.0 made an update of an epoch's last batches, however few
        raise ConfigError(f"{path}: began a run of {planned} updates, cannot go on with one of {updates}")
    if shapes[0] == shapes[1]:
        return
    if job.train_loader.sampler.shards and state["so_far"]["batches"]:
        raise ConfigError(
            f"{path}: within an epoch over shards, a run goes on only as it began: {was}, not {now}"
        )
    if distributed.is_main():
        print(
            f"began with {was}, goes on with {now}: the same videos an update, so the same run within "
            "rounding; what is drawn at random in the model (drop path, mixup) is drawn anew"
        )
