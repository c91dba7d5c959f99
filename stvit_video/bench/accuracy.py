"""What token reduction costs in accuracy and gives in speed: one recipe, one backbone, several seeds."""

import contextlib
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from .. import build
from ..config import Config, ConfigError, from_dict, resolve, to_dict
from ..data.dataset import open_kept
from ..engine.device import pick_precision
from ..engine.logs import progress, read_log
from ..engine.train import fit
from ..errors import DecodeError
from ..figures import draw_trade
from ..files import written_whole
from .model import measure_models

BATCH = 16  # clips, where speed is measured
TRADE = ("model", "clips/s", "top-1", "low", "high")  # what the picture needs of a table
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def bench_accuracy(
    config: Config,
    variants: Sequence[str],
    *,
    seeds: Sequence[int],
    rounds: int,
    beside: Mapping[str, Sequence[dict]],
    output: Path,
    device: torch.device,
) -> list[dict]:
    """Train each variant of the config's ViT with each seed; -> a row a variant, `accuracy.png` in output.

    A variant is the ViT with what its name says, as `variant` reads it: "dense", "semantic:4x2x2".
    Accuracy is that of one view after the last epoch, of the averaged weights where the recipe has them.
    With `model.weights` all start from that checkpoint. Videos are decoded once and kept. A run that
    stands finished in `output` is not trained again. beside: tables of other runs, drawn into the picture.
    """
    configs = {name: variant(config, name) for name in variants}
    rows, class_names = build.read_split(config, "train")
    val_rows, _ = build.read_split(config, "val", class_names)
    models = {name: build.build_model(own, len(class_names)) for name, own in configs.items()}
    speeds = measure_models(
        models,
        num_frames=config.data.num_frames,
        image_size=config.data.image_size,
        batches=[BATCH],
        modes=["forward"],
        dtype=DTYPES[pick_precision(config.train.precision, device)],
        rounds=rounds,
        device=device,
    )
    for row in progress([*rows, *val_rows], desc="reading", unit="video"):
        with contextlib.suppress(DecodeError):  # each run tells it
            open_kept(row, config.data.decoder)
    results: dict[str, list[dict]] = {name: [] for name in variants}
    runs = [(seed, name) for seed in seeds for name in variants]
    with progress(runs, desc="training", unit="run") as bar:
        for seed, name in bar:
            folder = output / re.sub(r"[^\w.=-]+", "_", f"{name}_seed{seed}")
            job = replace(configs[name], seed=seed, output=str(folder))
            results[name].append(_finished(job) or _train(job, device))
    table = []
    for speed in speeds:
        top1 = [100 * run["accuracy"] for run in results[speed["model"]]]
        row = {key: speed[key] for key in ("model", "G multiply-adds", "clips/s", "ratio")}
        row |= {"top-1": statistics.mean(top1), "low": min(top1), "high": max(top1)}
        seconds = statistics.mean(run["seconds"] for run in results[speed["model"]])
        table.append(row | {"seconds": seconds})
    draw_trade({**beside, output.name: table}, output / "accuracy.png")
    return table


def variant(config: Config, name: str) -> Config:
    """The config with the model that `name` says: its parts have colons between.

    First "dense" or a reducer; then how many tokens, TxHxW (none: ToMe's schedule); then any settings,
    those of `model` by their own name: "semantic:4x2x2:base_depth=3", "dense:train.layer_decay=1".
    Raises ConfigError.
    """
    reducer, *parts = name.split(":")
    where, values = f"--models {name}", to_dict(build.with_model(config))
    settings = {"semantic_tokens": None}
    if reducer != "dense":
        settings["reducer"] = reducer
    for part in parts:
        if "=" in part:
            key, value = setting(part, where)
            settings[key] = value
            if "." in key and not key.startswith(("model.", "train.")):
                raise ConfigError(
                    f"{where}: {part!r}: models may differ in settings of model and train alone"
                )
            continue
        settings["semantic_tokens"] = [int(n) for n in part.split("x") if n.isdecimal()]
        if reducer == "dense" or not re.fullmatch(r"\d+x\d+x\d+", part):
            raise ConfigError(f"{where}: {part!r} is neither TxHxW tokens of a reducer nor KEY=VALUE")
    if reducer == "dense":
        settings["semantic_tokens"] = None
        if values["model"].get("tome_r") not in (None, "auto"):
            settings["tome_r"] = None
    elif not any(map(settings.get, ("semantic_tokens", "tome_r"))):
        raise ConfigError(f"{where}: says neither how many tokens, TxHxW, nor tome_r=N")
    if reducer == "pool" and values["model"]["pool"] == "merge":
        settings.setdefault("pool", "avg")  # merging is no pooling
    for key, value in settings.items():
        group, _, key = key.rpartition(".")
        values.setdefault(group or "model", {})[key] = value
    chosen = resolve(from_dict(values, where))
    build.build_model(chosen, 1)
    return chosen


def setting(part: str, where: str) -> tuple[str, Any]:
    """KEY=VALUE, a value as YAML has it. Raises ConfigError."""
    key, _, value = part.partition("=")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"{where}: {part!r} has no value that YAML reads") from None


def _train(config: Config, device: torch.device) -> dict:
    """A run like any other -> its accuracy and seconds, also written to its folder."""
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    decisive = _decisive(config)
    config = replace(config, data=replace(config.data, keep=True, workers=0, timeout=None))
    started = time.perf_counter()
    job, _ = build.build_job(config, device)
    fit(job, config.train, output=output, seed=config.seed, resume=None)
    entries = [entry for entry in read_log(output / "log.jsonl") if entry["kind"] == "epoch"]
    best = f"val_{job.task.watched[0]}"
    result = {"accuracy": entries[-1][best], "seconds": time.perf_counter() - started}
    with written_whole(output / "result.yaml") as part:
        part.write_text(yaml.safe_dump({"config": decisive, **result}))
    return result


def _finished(config: Config) -> Mapping | None:
    """What a run with this very config has left, if it has ended."""
    path = Path(config.output, "result.yaml")
    if not path.exists():
        return None
    result = yaml.safe_load(path.read_text())
    return result if result["config"] == _decisive(config) else None


def _decisive(config: Config) -> dict:
    """What decides a run's result: all settings but where it lies and how its videos are read."""
    settings = to_dict(config)
    del settings["output"], settings["device"]
    for key in ("workers", "keep", "timeout"):
        del settings["data"][key]
    return settings
