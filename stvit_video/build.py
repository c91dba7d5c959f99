"""The only place where settings become objects."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from .config import Config, ConfigError, DataConfig
from .data.annotations import ListError, Row, Rows, mirrored, mirrored_classes, read_rows
from .data.dataset import TestSampler, TrainSampler, VideoDataset, make_loader, shards_of
from .data.demo import is_demo, prepare_demo
from .data.shards import find_shards
from .data.transforms import Normalise, TestTransform, TrainTransform
from .data.views import Sampling, TestViews, TrainViews
from .engine import distributed
from .models.zoo import create_model
from .weights import LoadReport, load_weights


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The model with random weights. Raises ConfigError where sizes do not fit."""
    try:
        return create_model(
            config.model.name,
            num_classes=num_classes,
            num_frames=config.data.num_frames,
            image_size=config.data.image_size,
            **config.model.sizes(),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from None


def load_pretrained(
    config: Config, model: nn.Module, class_names: Sequence[str], *, scoring: bool = False
) -> LoadReport | None:
    """`model.weights` into the model, where it is set. To score, nothing may be fresh.

    Raises WeightsError.
    """
    if config.model.weights is None:
        return None
    return load_weights(
        model,
        config.model.weights,
        inflate=config.model.inflate,
        fresh=() if scoring else config.model.fresh,
        class_names=class_names,
    )


def build_normalise(data: DataConfig) -> Normalise:
    return Normalise(data.mean, data.std)


def read_split(
    config: Config, split: str, class_names: Sequence[str] | None = None
) -> tuple[Rows, list[str]]:
    """The rows of `data.train`, `data.val` or `data.test`, and the class names by id.

    class_names: names that decide the ids, from the training list or a checkpoint. Without them they come
    from `data.class_names`, the list itself, or the numbers 0..K-1.
    Raises ConfigError or ListError.
    """
    data = config.data
    path = getattr(data, split) or (data.val if split == "test" else None)
    if path is None:
        raise ConfigError(f"data.{split} is not set: a list file or a folder of class folders")
    if data.decoder == "decord" and find_spec("decord") is None:
        raise ConfigError("data.decoder=decord is not installed: pip install decord")
    if data.preset == "demo":
        _prepare_demo(Path(path))
    if class_names is None and data.class_names is not None:
        class_names = _read_names(data.class_names)
    rows = read_rows(path, root=data.root, labels=data.labels, class_names=class_names)
    if not rows:
        raise ConfigError(f"data.{split}={path}: no videos in it")
    names = class_names or rows.class_names
    if names is None:
        highest = max((row.label for row in rows if row.label is not None), default=0)
        names = [str(i) for i in range(data.num_classes or highest + 1)]
    if data.num_classes not in (None, len(names)):
        raise ConfigError(f"data.num_classes={data.num_classes}, but there are {len(names)} class names")
    for row in rows:
        if row.label is not None and row.label >= len(names):
            raise ConfigError(f"{path}: label {row.label} of {row.path}: must be below {len(names)}")
    return rows, list(names)


def read_lists(config: Config) -> tuple[dict[str, list[Row]], list[str], dict[str, ListError]]:
    """For checking: the rows of each list that is set, the class names, and the lists with unknown classes.

    Labels are as the lists have them, also beyond the class names; where a list names a class that is
    unknown its rows have none. Raises ConfigError or ListError for lists that cannot be read at all.
    """
    data = config.data
    names = None if data.class_names is None else _read_names(data.class_names)
    splits: dict[str, list[Row]] = {}
    unknown: dict[str, ListError] = {}
    for split in ("train", "val", "test"):
        path = getattr(data, split)
        if path is None:
            continue
        if data.preset == "demo":
            _prepare_demo(Path(path))
        options = {"root": data.root, "labels": data.labels}
        rows = read_rows(path, **options)
        if names is not None and rows.class_names is not None:
            try:
                rows = read_rows(path, **options, class_names=names)
            except ListError as error:
                unknown[split] = error
                rows = Rows(replace(row, target=None) for row in rows)
        if names is None:
            highest = max((row.label for row in rows if row.label is not None), default=0)
            names = rows.class_names or [str(i) for i in range(data.num_classes or highest + 1)]
        splits[split] = rows
    if not splits:
        raise ConfigError("none of data.train, data.val and data.test is set: nothing to check")
    if data.num_classes not in (None, len(names)):
        raise ConfigError(f"data.num_classes={data.num_classes}, but there are {len(names)} class names")
    return splits, names, unknown


def _prepare_demo(path: Path) -> None:
    """Render the demo set where the list is to be, unless something else lies there, or shards do."""
    absent = not path.exists() and not find_shards(path)
    if distributed.is_main() and (is_demo(path.parent) or absent):
        prepare_demo(path.parent)
    distributed.barrier()


def _read_names(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.class_names={path}: not readable ({error})") from None
    names = [line.strip() for line in lines if line.strip()]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"data.class_names={path}: {min(twice)!r} stands there twice")
    return names


def build_sampling(data: DataConfig) -> Sampling:
    return Sampling(data.sampling, data.num_frames, data.stride, data.target_fps)


def build_test_views(config: Config, clips: int, crops: int) -> TestViews:
    transform = TestTransform(config.data.image_size, crops=crops, crop_ratio=config.eval.crop_ratio)
    return TestViews(build_sampling(config.data), transform, clips)


def build_train_loader(
    config: Config, rows: Sequence[Row], class_names: Sequence[str], device: torch.device
) -> DataLoader:
    data = config.data
    unlabelled = next((row.path for row in rows if row.label is None), None)
    if unlabelled is not None:
        raise ConfigError(f"data.train={data.train}: {unlabelled} has no label to train on")
    twins = None
    if data.flip == "swap":
        twins = mirrored_classes(class_names)
        if twins == list(range(len(twins))):
            raise ConfigError(
                "data.flip=swap: no class name says left or right; a list of numbers needs data.class_names"
            )
    transform = TrainTransform(
        data.image_size,
        scale=data.scale,
        ratio=data.ratio,
        rand_augment=data.rand_augment,
        flip=data.flip != "none",
        mirror=twins and functools.partial(mirrored, twins=twins),
    )
    views = TrainViews(build_sampling(data), transform, data.repeats)
    dataset = _dataset(config, rows, views, substitute=True)
    sampler = TrainSampler(
        len(rows),
        batch_size=config.train.batch_size,
        seed=config.seed,
        rank=distributed.rank(),
        world=distributed.world(),
        shards=shards_of(rows),
        buffer=data.shuffle_buffer,
    )
    return _loader(config, dataset, sampler, config.train.batch_size, device)


def build_test_loader(
    config: Config, rows: Sequence[Row], device: torch.device, *, clips: int, crops: int
) -> DataLoader:
    dataset = _dataset(config, rows, build_test_views(config, clips, crops), substitute=False)
    sampler = TestSampler(len(rows), rank=distributed.rank(), world=distributed.world())
    return _loader(config, dataset, sampler, config.eval.batch_size, device)


def _dataset(
    config: Config, rows: Sequence[Row], views: TrainViews | TestViews, *, substitute: bool
) -> VideoDataset:
    data = config.data
    return VideoDataset(
        rows,
        views,
        decoder=data.decoder,
        seed=config.seed,
        substitute=substitute,
        timeout=data.timeout,
        keep=data.keep,
        max_unreadable=data.max_unreadable,
    )


def _loader(config, dataset, sampler, batch_size: int, device: torch.device) -> DataLoader:
    return make_loader(
        dataset,
        sampler,
        batch_size=batch_size,
        workers=config.data.workers,
        pin_memory=device.type == "cuda",
        persistent=dataset.substitute or dataset.keep,  # of validation they end with the pass
    )
