"""The only place where settings become objects."""

import dataclasses
import hashlib
import inspect
import itertools
import os
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from .config import (
    Config,
    ConfigError,
    DataConfig,
    from_dict,
    refuse_idle_scoring,
    settle_pixels,
    task_settings,
    to_dict,
)
from .data.annotations import SIDE_WORD, ListError, Row, Rows, mirrored_classes, read_rows
from .data.dataset import TestSampler, TrainSampler, VideoDataset, make_loader, shards_of
from .data.demo import is_demo, prepare_demo
from .data.demo_movers import prepare_movers
from .data.demo_objects import prepare_objects
from .data.demo_scenes import prepare_scenes
from .data.media import IMAGE_SUFFIXES
from .data.preview import make_preview
from .data.rows import class_ids
from .data.sampling import permuted
from .data.shards import find_shards
from .data.transforms import Normalise
from .data.views import Sampling
from .engine import checkpoint, distributed
from .engine.job import Job, Task, Views
from .models.zoo import HEADS, MODELS, create_model
from .pixels import Pixels
from .tasks import TASKS, task_class
from .tasks.agreement import Agreement
from .weights import LoadReport, load_weights, model_of, rebuild


def with_model(config: Config) -> Config:
    """`model.name: auto` as the name and sizes of `model.weights`; task, head and sizes that are set stay.

    Raises ConfigError without weights, WeightsError where they do not tell.
    """
    if config.model.name != "auto":
        return config
    if config.model.weights is None:
        raise ConfigError("model.name=auto is the model of model.weights: give --model.weights FILE")
    sizes, chosen = model_of(config.model.weights, num_frames=config.data.num_frames), config.model.sizes()
    if sizes.get("superpatches") is None:
        sizes.pop("superpatch_std", None)  # of none: says nothing about those to come
    if sizes.get("pool") == "merge":  # merged tokens lie on no grid
        if chosen.get("base_window") is not None:
            sizes["pool"] = "grid"
        elif chosen.get("reducer") == "pool":
            sizes["pool"] = "avg"
    heads, theirs, head = TASKS[config.task].heads, sizes.pop("head", None), config.model.head
    if head == "auto":
        head = theirs if theirs in heads else heads[0]
    taken = {"name", *MODELS[sizes["name"]].sizes}  # and not what only their head has, as exits
    taken |= {*inspect.signature(HEADS[head]).parameters} if head in HEADS else set()
    if not sizes.get("exits"):
        taken -= {"exits", "exit_head", "exit_threshold"}
    sizes = {key: value for key, value in sizes.items() if key in taken} | chosen | {"head": head}
    return replace(config, model=replace(config.model, **sizes))


# What renders a demo set, by its folder's name; of other names, clips of one moving shape.
RENDERERS = {
    "demo_objects": prepare_objects,
    "demo_scenes": prepare_scenes,
    "demo_movers": prepare_movers,
}


MOST_CLASSES = 1_000_000  # each costs memory; a list with a higher label means something else by it


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The model with random weights. Raises ConfigError where sizes do not fit."""
    config = with_model(config)
    heads = TASKS[config.task].heads
    head = heads[0] if config.model.head == "auto" else config.model.head
    if head not in heads:
        known = ", ".join(str(name or "null") for name in heads)
        raise ConfigError(f"model.head={head}: task={config.task} has {known}")
    try:
        return create_model(
            config.model.name,
            num_classes=num_classes,
            num_frames=config.data.num_frames,
            image_size=config.data.image_size,
            head=head,
            **config.model.sizes(),
        )
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: torch's, of sizes beyond memory
        size = re.search(r"takes no size '(\w+)'", str(error))
        hint = f": model.{size[1]}=auto leaves it out" if size else ""
        raise ConfigError(f"model: {str(error).partition(chr(10))[0]}{hint}") from None


def with_checked_model(config: Config) -> Config:
    """`with_model`; sizes that do not fit are refused here, before any data is touched: only a model knows
    its rules, and one without memory is made in no time. Raises as `with_model` and `build_model`."""
    config = with_model(config)
    if config.model.name != "ptv_mvit_base_16x4":  # which computes as it is made
        with torch.device("meta"):
            build_model(config, num_classes=2)
    return config


def load_model(path: str | Path) -> tuple[Config, list[str], torch.nn.Module]:
    """A checkpoint's settings, class names and model (its averaged weights, where it has them).

    Raises CheckpointError, ConfigError or WeightsError.
    """
    values = checkpoint.load(path)
    missing = {"config", "class_names", "model", "ema"} - values.keys()
    if missing:
        raise checkpoint.CheckpointError(f"{path}: holds no {min(missing)}")
    config = settle_pixels(from_dict(values["config"], str(path)), None)  # older ones lack some
    model = rebuild(values, str(path))
    try:
        model.load_state_dict(values["model"] if values["ema"] is None else values["ema"])
    except RuntimeError as error:
        cause = " ".join(str(error).split())
        raise checkpoint.CheckpointError(f"{path}: weights do not fit its settings: {cause}") from None
    return config, values["class_names"], model.eval()


def load_teacher(config: Config, task: Task, class_names: Sequence[str], model: nn.Module) -> None:
    """`train.teacher` into the task, where it is set. Raises ConfigError unless it takes the same clips and
    has what the model is to learn."""
    path = config.train.teacher
    if path is None:
        return
    if not hasattr(task, "teacher"):
        raise ConfigError(f"train.teacher={path}: task={config.task} learns from no teacher")
    theirs, names, task.teacher = load_model(path)
    if not isinstance(task, Agreement) and names != list(class_names):
        raise ConfigError(
            f"train.teacher={path}: its classes are not those of data.train={config.data.train}"
        )
    for key in ("num_frames", "image_size", "mean", "std", "interpolation"):
        ours, value = (getattr(c.data, key) for c in (config, theirs))
        if ours != value:
            raise ConfigError(f"train.teacher={path}: was trained with data.{key}={value}, not {ours}")
    if isinstance(task, Agreement):
        try:
            model.check_teacher(task.teacher)
        except ValueError as error:
            raise ConfigError(f"train.teacher={path}: {error}") from None
    task.teacher.requires_grad_(False)


def load_pretrained(
    config: Config, model: nn.Module, class_names: Sequence[str], *, scoring: bool = False
) -> LoadReport | None:
    """`model.weights` into the model, where it is set. To score, nothing may be fresh.

    Raises WeightsError.
    """
    if config.model.weights is None:
        return None
    later = () if config.model.policy is None else ("policy",)
    return load_weights(
        model,
        config.model.weights,
        inflate=config.model.inflate,
        fresh=later if scoring else (*config.model.fresh, *later),
        class_names=class_names,
    )


def load_policy(config: Config, model: nn.Module) -> None:
    """`model.policy` into the model. Raises ConfigError unless it decides about the same groups by the same
    pixels; and where chance would decide."""
    path, ours = config.model.policy, getattr(_superpatches(model), "policy", None)
    if path is None:
        if ours is not None and config.model.weights is None and config.task != "policy":
            raise ConfigError(
                "model.superpatches=dcts: without model.policy (what --task policy trains) or "
                "model.weights chance would decide"
            )
        return
    if ours is None:
        raise ConfigError(f"model.policy={path}: the model has no superpatches=dcts")
    theirs, _, trained = load_model(path)
    if theirs.task != "policy":
        raise ConfigError(f"model.policy={path}: was trained for task={theirs.task}, not policy")
    for key in ("mean", "std"):
        if getattr(config.data, key) != getattr(theirs.data, key):
            raise ConfigError(
                f"model.policy={path}: was trained with data.{key}={list(getattr(theirs.data, key))}, not "
                f"{list(getattr(config.data, key))}"
            )
    policy = trained.superpatches.policy
    for key in ("patch_size", "shapes"):
        if getattr(policy, key) != getattr(ours, key):
            raise ConfigError(
                f"model.policy={path}: decides by {key}={getattr(policy, key)}, not {getattr(ours, key)}"
            )
    try:
        ours.load_state_dict(policy.state_dict())
    except RuntimeError:
        raise ConfigError(
            f"model.policy={path}: another network than model.superpatch_policy="
            f"{config.model.superpatch_policy}"
        ) from None


def _superpatches(model: nn.Module) -> nn.Module | None:
    return getattr(getattr(model, "backbone", model), "superpatches", None)


def settle_superpatches(config: Config, model: nn.Module) -> None:
    """`model.superpatch_std: auto` is `data.std`, once that is settled; `model.built` keeps it."""
    superpatches = _superpatches(model)
    if superpatches is None or config.model.superpatch_std != "auto":
        return
    std = torch.tensor(config.data.std)
    if not std.equal(superpatches.std):
        superpatches.std, model.built["superpatch_std"] = std, list(config.data.std)


def with_pixels(config: Config, report: LoadReport | None) -> Config:
    """The settings with the pixels of the weights; the report notes what contradicts them."""
    if report is None:
        return settle_pixels(config, None)
    settled, wanted = settle_pixels(config, report.pixels), report.pixels
    has = Pixels(settled.data.mean, settled.data.std, settled.data.interpolation)
    if wanted is None:
        report.notes.append(
            f"does not say how its pixels were normalised: data.mean={list(has.mean)}, data.std="
            f"{list(has.std)} is taken (timm's AugReg models want 0.5 for all)"
        )
    elif has != wanted:
        report.notes.append(
            f"was trained with mean {list(wanted.mean)}, std {list(wanted.std)}, {wanted.interpolation}, "
            f"and is given data.mean={list(has.mean)}, data.std={list(has.std)}, data.interpolation="
            f"{has.interpolation}"
        )
    return settled


def build_task(config: Config, class_names: Sequence[str]) -> Task:
    """The task that `task` names. Raises ConfigError or ListError."""
    config = settle_pixels(config, None)
    entry, scoring = TASKS[config.task], {}
    if entry.scoring is not None:
        names = [field.name for field in dataclasses.fields(entry.scoring)]
        scoring["scoring"] = entry.scoring(**{name: getattr(config.eval, name) for name in names})
    return task_class(config.task, config.train.teacher)(
        class_names,
        normalise=Normalise(config.data.mean, config.data.std),
        settings=entry.settings(**task_settings(config)),
        **scoring,
        view_batch=config.eval.view_batch,
        on_failure=config.eval.on_failure,
        twins=_twins(class_names) if config.data.flip == "swap" else None,
        dump_views=config.eval.dump_views,
    )


def _twins(class_names: Sequence[str]) -> list[int] | None:
    """Class id -> class id of its mirror image; None where no class has a side."""
    twins = mirrored_classes(class_names)
    return None if twins == list(range(len(twins))) else twins


def _sided(class_names: Sequence[str]) -> str | None:
    """The first class whose name says left or right."""
    return next((name for name in class_names if SIDE_WORD.search(name)), None)


def build_job(
    config: Config, device: torch.device, *, pretrained: bool = True
) -> tuple[Job, LoadReport | None]:
    """All that training needs; and what became of `model.weights`, where it was loaded.

    pretrained: False leaves `model.weights` alone, for a run that goes on from its own checkpoint.
    """
    refuse_idle_scoring(config)
    config = with_checked_model(config)
    rows, class_names = read_split(config, "train")
    if config.task == "classification" and len(class_names) == 1:
        raise ConfigError(
            f"data.train={config.data.train}: has only the class {class_names[0]!r}, to tell apart takes "
            "two (of a folder, its sub-folders are the classes)"
        )
    torch.manual_seed(config.seed)
    model = build_model(config, build_task(config, class_names).outputs)
    if config.train.freeze is not None and config.model.weights is None and pretrained:
        raise ConfigError(
            f"train.freeze={config.train.freeze}: without model.weights chance would be frozen"
        )
    report = load_pretrained(config, model, class_names) if pretrained else None
    config = with_pixels(config, report)
    settle_superpatches(config, model)
    if pretrained:
        load_policy(config, model)
    task = build_task(config, class_names)
    load_teacher(config, task, class_names, model)
    task.to(device)
    if config.data.flip == "swap" and task.twins is None:
        raise ConfigError(
            "data.flip=swap: no class name says left or right; a list of numbers needs data.class_names"
        )
    if config.data.flip == "all" and distributed.is_main() and (sided := _sided(class_names)):
        print(
            f"warning: data.flip=all mirrors clips of {sided!r}, too, whose label then is wrong: swap "
            "takes the label of the other side, none mirrors nothing",
            file=sys.stderr,
        )
    loader, val_loader = build_train_loader(config, task, rows, device), None
    if config.data.val is not None or config.data.hold_back:
        val_rows, _ = read_split(config, "val", class_names)
        if all(row.target is None for row in val_rows) and not isinstance(task, Agreement):
            raise ConfigError(f"data.val={config.data.val} has no labels to validate with")
        val_loader = build_test_loader(config, task, val_rows, device, clips=1, crops=1)
    run = {"seed": config.seed, "ranks": distributed.world(), "videos": len(rows), "list": digest(rows)}
    details = {"class_names": class_names, "config": to_dict(config), "built": model.built, "run": run}
    return Job(task, model.to(device), device, loader, val_loader, details), report


def digest(rows: Sequence[Row]) -> str:
    """What tells one training list from another, wherever its files lie: names and targets, in order."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(f"{os.path.basename(row.path)}\0{row.target}\n".encode(errors="surrogateescape"))
    return hashed.hexdigest()


def read_split(
    config: Config, split: str, class_names: Sequence[str] | None = None
) -> tuple[Rows, list[str]]:
    """The rows of `data.train`, `data.val` or `data.test`, and the class names by id.

    Without `data.val`, `data.hold_back` shares out the rows of `data.train`: see `hold_back`.
    class_names: names that decide the ids, from the training list or a checkpoint. Without them they come
    from `data.class_names`, the list itself, or the numbers 0..K-1.
    Raises ConfigError or ListError.
    """
    data = config.data
    path = getattr(data, split) or (data.val if split == "test" else None)
    shared_out = data.hold_back > 0 and data.val is None and path in (None, data.train)
    path = data.train if shared_out else path
    if path is None:
        raise ConfigError(f"data.{split} is not set: a list file or a folder of class folders")
    if data.decoder == "decord" and find_spec("decord") is None:
        raise ConfigError("data.decoder=decord is not installed: pip install decord")
    if data.preset == "demo":
        _prepare_demo(Path(path))
    if class_names is None and data.class_names is not None:
        class_names = read_names(data.class_names)
    rows = read_rows(path, root=data.root, labels=data.labels, class_names=class_names, format=data.format)
    if not rows:
        raise ConfigError(f"data.{split}={path}: no videos in it")
    names = class_names or rows.class_names
    if names is None:
        names = _numbers(rows, path, data.num_classes)
    if data.num_classes not in (None, len(names)):
        raise ConfigError(f"data.num_classes={data.num_classes}, but there are {len(names)} class names")
    for row in rows:
        if max(class_ids(row.target), default=0) >= len(names):
            raise ConfigError(f"{path}: label {row.target} of {row.path}: must be below {len(names)}")
    hint = _absent(rows, data.root) or _stills(rows, data.num_frames)
    if distributed.is_main() and hint and (split == "train" or not shared_out):
        print(f"warning: data.{split}={path}: {hint}", file=sys.stderr)
    if shared_out:
        rows = hold_back(rows, data.hold_back, config.seed)[split != "train"]
    return rows, list(names)


def _absent(rows: Rows, root: str | None) -> str | None:
    """What may be wrong where none of some rows, from all over the list, is a file or folder."""
    some = [rows[i] for i in sorted(itertools.islice(permuted(len(rows), 0), 16))]
    if any(row.place is not None or os.path.exists(row.path) for row in some):
        return None
    path, hint = some[0].path, ""
    name = os.path.relpath(path, root) if root else path
    numbered = re.fullmatch(r"\d+[ \t,]+(\S.*)", name)
    is_folder = root and Path(root).is_dir()
    roots = [Path(root).parent, *filter(Path.is_dir, Path(root).iterdir())] if is_folder else []
    if "'" in (name[0], name[-1]):
        hint = "; paths stand in single quotes"
    elif numbered and os.path.exists(Path(root or "", numbered[1])):
        hint = "; lines begin with a number"
    elif base := next((base for base in roots if Path(base, name).exists()), None):
        hint = f"; it is there with data.root={base}"
    return f"none of the {len(some)} videos looked for is there, the first: {path}{hint}"


def _stills(rows: Rows, num_frames: int) -> str | None:
    """What may be wrong where all rows are single images."""
    if num_frames == 1 or not all(Path(row.path).suffix.lower() in IMAGE_SUFFIXES for row in rows):
        return None
    return f"all are single images, each {num_frames} times in a clip; data.num_frames=1 is image mode"


def hold_back(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """-> the rows to train on, and those to validate on: of each class `share`, rounded, at least one.

    Rows of one video stay together. Where a row has no one class (several, masks, boxes), all are alike.
    Which ones depends on the seed and the class alone. Raises ConfigError where a class has but one video.
    """
    videos: dict[str, int | None] = {}  # the class of each
    for row in rows:
        videos.setdefault(row.path, row.target if isinstance(row.target, int) else None)
    classes: dict[int | None, list[str]] = {}
    for path, target in videos.items():
        classes.setdefault(target, []).append(path)
    held = set()
    for target, members in classes.items():
        count = max(round(share * len(members)), 1)
        if count >= len(members):
            name = rows.class_names[target] if rows.class_names and target is not None else target
            of_class = "" if target is None else f" of class {name!r}"
            raise ConfigError(
                f"data.hold_back={share:g}: of the {len(members)} videos{of_class} none would be left to "
                "train on; give data.val"
            )
        held.update(random.Random(f"{seed} {target}").sample(members, count))
    parts = ([row for row in rows if (row.path in held) == back] for back in (False, True))
    return tuple(Rows(part, rows.class_names, rows.category_ids) for part in parts)


def read_lists(config: Config) -> tuple[dict[str, list[Row]], list[str], dict[str, ListError]]:
    """For checking: the rows of each list that is set, the class names, and the lists with unknown classes.

    Labels are as the lists have them, also beyond the class names; where a list names a class that is
    unknown its rows have none. Raises ConfigError or ListError for lists that cannot be read at all.
    """
    data = config.data
    names = None if data.class_names is None else read_names(data.class_names)
    splits: dict[str, list[Row]] = {}
    unknown: dict[str, ListError] = {}
    for split in ("train", "val", "test"):
        path = getattr(data, split)
        if path is None:
            continue
        if data.preset == "demo":
            _prepare_demo(Path(path))
        options = {"root": data.root, "labels": data.labels, "format": data.format}
        rows = read_rows(path, **options)
        if names is not None and rows.class_names is not None:
            try:
                rows = read_rows(path, **options, class_names=names)
            except ListError as error:
                unknown[split] = error
                rows = Rows(replace(row, target=None) for row in rows)
        if names is None:
            names = rows.class_names or _numbers(rows, path, data.num_classes)
        splits[split] = rows
    if not splits:
        raise ConfigError("none of data.train, data.val and data.test is set: nothing to check")
    if data.num_classes not in (None, len(names)):
        raise ConfigError(f"data.num_classes={data.num_classes}, but there are {len(names)} class names")
    return splits, names, unknown


def highest_class(rows: Sequence[Row]) -> int:
    return max((max(class_ids(row.target), default=0) for row in rows), default=0)


def _numbers(rows: Sequence[Row], path: str, num_classes: int | None) -> list[str]:
    """The names of classes that have none: 0, 1, ... Raises ConfigError for more than there can be."""
    count = num_classes or highest_class(rows) + 1
    if count > MOST_CLASSES:
        source = "data.num_classes" if num_classes else "the highest label"
        raise ConfigError(f"{path}: {count} classes by {source}, expected {MOST_CLASSES} at most")
    return [str(i) for i in range(count)]


def _prepare_demo(path: Path) -> None:
    """Render the demo set where the list is to be, unless something else lies there, or shards do."""
    absent = not path.exists() and not find_shards(path)
    if distributed.is_main() and (is_demo(path.parent) or absent):
        RENDERERS.get(path.parent.name, prepare_demo)(path.parent)
    distributed.barrier()


def read_names(path: str) -> list[str]:
    """A file's class names by id: one a line, or `0 name` in any order. Raises ConfigError."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.class_names={path}: not readable ({error})") from None
    names = [line.strip() for line in lines if line.strip()]
    numbered = [re.fullmatch(r"(\d+)[ \t,:]+(\S.*)", name) for name in names]
    if names and all(numbered) and sorted(int(line[1]) for line in numbered) == list(range(len(names))):
        names = [line[2] for line in sorted(numbered, key=lambda line: int(line[1]))]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"data.class_names={path}: {min(twice)!r} stands there twice")
    return names


def build_sampling(data: DataConfig) -> Sampling:
    return Sampling(data.sampling, data.num_frames, data.stride, data.target_fps)


def build_test_views(config: Config, task: Task, clips: int, crops: int) -> Views:
    data, ratio = settle_pixels(config, None).data, config.eval.crop_ratio
    return task.test_views(build_sampling(data), data, clips=clips, crops=crops, crop_ratio=ratio)


def build_train_loader(config: Config, task: Task, rows: Sequence[Row], device: torch.device) -> DataLoader:
    """Raises InputError for rows that the task cannot be trained on."""
    data = settle_pixels(config, None).data
    task.check(rows, f"data.train={data.train}")
    views = task.train_views(build_sampling(data), data)
    sampler = TrainSampler(
        len(rows),
        batch_size=config.train.batch_size,
        accumulate=config.train.accumulate,
        seed=config.seed,
        rank=distributed.rank(),
        world=distributed.world(),
        shards=shards_of(rows),
        buffer=data.shuffle_buffer,
    )
    dataset = _dataset(config, task, rows, views, substitute=True)
    return _loader(config, dataset, sampler, config.train.batch_size, device, persistent=True)


def build_test_loader(
    config: Config,
    task: Task,
    rows: Sequence[Row],
    device: torch.device,
    *,
    clips: int,
    crops: int,
    previews: bool = False,
) -> DataLoader:
    """previews: samples bring one of their video, where the task's views make some."""
    task.check([row for row in rows if row.target is not None], "the list to score")
    views = build_test_views(config, task, clips, crops)
    if previews and hasattr(views, "preview"):
        views = replace(views, preview=make_preview)
    dataset = _dataset(config, task, rows, views, substitute=False)
    sampler = TestSampler(len(rows), rank=distributed.rank(), world=distributed.world())
    return _loader(config, dataset, sampler, config.eval.batch_size, device, persistent=config.data.keep)


def _dataset(
    config: Config, task: Task, rows: Sequence[Row], views: Views, *, substitute: bool
) -> VideoDataset:
    data = config.data
    return VideoDataset(
        rows,
        views,
        encode=task.encode,
        decoder=data.decoder,
        seed=config.seed,
        substitute=substitute,
        timeout=data.timeout,
        keep=data.keep,
        max_unreadable=data.max_unreadable,
    )


def _loader(
    config: Config, dataset, sampler, batch_size: int, device: torch.device, *, persistent: bool
) -> DataLoader:
    return make_loader(
        dataset,
        sampler,
        batch_size=batch_size,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        pin_memory=device.type == "cuda",
        persistent=persistent,
    )
