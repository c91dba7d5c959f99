"""Every setting, typed, with its meaning; read from YAML and the command line, checked by name.

An unknown key stops with its place and the nearest known one. A preset carries what belongs to a data set
(sampling, flip, views, normalisation), and contradicting it is an error.
"""

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from . import bounds
from .bounds import Count, Range
from .engine.settings import LoopConfig
from .errors import InputError, nearest
from .models.sizes import Inflate, Sizes
from .pixels import IMAGENET, Pixels
from .tasks import TASKS

CONFIGS = Path(__file__).with_name("configs")  # a link to the repository's folder; a wheel has a copy
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(1e-6)]
Colour = tuple[float, float, float]


class ConfigError(InputError):
    """A setting that is unknown, malformed or contradictory: names the key, its value and the rule."""


@dataclass
class ModelConfig(Sizes):
    """The model: a name of `stvit_video.list_models()` and its sizes; `auto` is what the name says."""

    name: str = "stvit_small_patch16_224"
    """Which model; auto: the one that model.weights are for, sizes and all (of a dense one, its STViT)."""
    head: str | None = "auto"
    """What stands on the model: one of the task's heads, by name; auto: its first; null: a classifier."""
    weights: str | None = None
    """Checkpoint to start from, of any origin: a file, timm:NAME, or hf:OWNER/NAME."""
    policy: str | None = None
    """Checkpoint of task=policy: it decides about superpatches=dcts, and stays as it is."""
    inflate: Inflate = "average"
    """An image model's patch embedding over time: repeated and divided, or in the middle frame."""
    fresh: tuple[str, ...] = ("head", "centres", "chunk_embed", "vectors")
    """What may be missing or misshapen in weights when training."""

    def sizes(self) -> dict[str, Any]:
        """The sizes that were set, for `create_model`."""
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(Sizes)}
        return {key: value for key, value in sizes.items() if value != "auto"}


@dataclass
class DataConfig:
    """The data: lists, which frames, which pixels."""

    preset: Literal["custom", "kinetics", "ssv2", "imagenet", "ava", "demo"] = "custom"
    """Carries sampling, flip, mean, std and views of a data set; custom leaves them free."""
    train: str | None = None
    """Training list: any format of the field, a folder of class folders, or WebDataset shards."""
    val: str | None = None
    """Validation list, looked at every train.eval_every epochs with one view."""
    hold_back: Share = 0.0
    """Without a validation list: share of the training list that is one, of each class, by the seed."""
    test: str | None = None
    """Test list; null: the validation list."""
    format: str | None = None
    """Format of the lists, by name; null: told by their content."""
    root: str | None = None
    """Folder that the lists' paths are relative to."""
    labels: str | None = None
    """Something-Something's labels json; null: found beside the list. AVA's label map."""
    first_second: Annotated[float, Range(0)] = 0.0
    """Key frames: which second of the list is the start of the video files (AVA in 15 minutes: 900)."""
    class_names: str | None = None
    """File with one class name a line (or `0 name`, with all ids), for lists that hold numbers only."""
    num_classes: Count | None = None
    """Number of classes; null: by the class names, else the highest training label + 1."""
    decoder: Literal["av", "decord"] = "av"
    """Which library decodes videos."""
    num_frames: Count = 16
    """Frames of a clip; 1 is image mode."""
    stride: Count = 4
    """Dense sampling: every stride-th frame."""
    target_fps: Annotated[float, Range(0.001)] | None = None
    """Frame rate at which stride counts; null: each video's own."""
    sampling: Literal["dense", "uniform", "middle"] | None = None
    """dense: every stride-th frame; uniform: one of each of num_frames segments; middle: the centre."""
    image_size: Count = 224
    """Height and width of a clip in pixels; where whole frames are looked at, of training crops."""
    short_side: Count | None = None
    """Segmentation: short side of images in pixels, before crops and when scoring; null: as they are."""
    ignore_label: Annotated[int, Range(0, 65535)] = 255
    """Segmentation: value of the pixels in masks that count nowhere."""
    mean: Colour | Literal["auto"] | None = "auto"
    """Normalisation: RGB mean, of values from 0 to 1; auto: that of model.weights, else the preset's."""
    std: tuple[Positive, Positive, Positive] | Literal["auto"] | None = "auto"
    """Normalisation: RGB standard deviation; auto: that of model.weights, else the preset's."""
    interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    """How frames are resized; auto: as for model.weights, else bilinear."""
    flip: Literal["none", "all", "swap"] | None = None
    """Mirror half of the training clips: never, always, or with the left/right twin's label."""
    scale: tuple[Annotated[float, Range(1e-6, 1)], Annotated[float, Range(1e-6, 1)]] = (0.08, 1.0)
    """Random resized crop: share of the area, from and to."""
    ratio: tuple[Annotated[float, Range(1e-3, 1e3)], Annotated[float, Range(1e-3, 1e3)]] = (0.75, 4 / 3)
    """Random resized crop: aspect ratio, from and to."""
    rand_augment: tuple[Annotated[int, Range(0, 10)], Annotated[int, Range(0, 10)]] | None = None
    """RandAugment: number of operations and magnitude (of 10); null: none."""
    augment_on: Literal["worker", "device"] = "worker"
    """Where training clips are resized and augmented: in loader processes, or behind the upload."""
    repeats: Count = 1
    """Random clips of each decoded training video (repeated augmentation)."""
    workers: Annotated[int, Range(0)] = 2
    """Loader processes a rank."""
    prefetch: Count = 2
    """Batches that a loader process makes ahead."""
    keep: bool = False
    """Decode each video once and keep all its frames, in every loader process: for small sets."""
    shuffle_buffer: Count = 10_000
    """Training from shards: videos of a rank that are shuffled at a time, after the order of the shards."""
    timeout: Annotated[float, Range(0.1, 1e6)] | None = 60.0
    """Seconds after which a video that does not come is given up as unreadable; null: never."""
    max_unreadable: Share = 0.1
    """Share of an epoch's videos that may be unreadable before training stops."""


# Settings that only some task has stand in `train`, too, and those of its scoring in `eval`.
_TASK_SETTINGS = tuple(dict.fromkeys(task.settings for task in TASKS.values()))
_TASK_SETTINGS = sorted(_TASK_SETTINGS, key=lambda s: -len(s.__mro__))  # before what they are made of
_TASK_SCORING = tuple(dict.fromkeys(task.scoring for task in TASKS.values() if task.scoring))


@dataclass
class EvalConfig(*_TASK_SCORING):
    """Scoring: each video once, its scores averaged over clips x crops views."""

    clips: Count | None = None
    """Clips of a video, spread from first frame to last (of sampling=middle one); null: the preset's."""
    crops: Count | None = None
    """Crops of a clip along its longer side; null: the preset's."""
    crop_ratio: Annotated[float, Range(0.01, 1)] | None = None
    """data.image_size over the resized short side; null: the preset's."""
    batch_size: Count = 4
    """Videos that a rank loads at a time."""
    view_batch: Count = 16
    """Views that go through the model at a time."""
    on_failure: Literal["wrong", "exclude"] = "wrong"
    """Unreadable videos count as wrong, or are left out of the figures; both are counted."""
    dump_views: bool = False
    """Also write the scores of every view, to views.npz."""
    previews: bool | Literal["auto"] = "auto"
    """Small moving pictures of the videos in report.html; auto: of lists with up to 2000 videos."""


@dataclass
class TrainConfig(LoopConfig, *_TASK_SETTINGS):
    """Training: AdamW, a warm-up, and a rate that falls."""


@dataclass
class Config:
    """Settings of a run."""

    output: str = "runs/default"
    """Folder for checkpoints, logs, reports and pictures."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """The run is a function of its settings and this."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: CUDA where there is one."""
    task: Literal[tuple(TASKS)] = "classification"
    """What is learnt: one class a video, several (multilabel), the class of each pixel (segmentation), the
    groups of patches that are of one class (policy), the objects in images (detection), or what each
    person does (action_detection)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


GROUPS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "eval": EvalConfig}


@dataclass(frozen=True)
class Preset:
    """What belongs to a data set. The first sampling and flip is the default, others are allowed too;
    views and pixels are defaults."""

    samplings: tuple[str, ...]
    flips: tuple[str, ...]
    clips: int
    crops: int
    crop_ratio: float = 1.0
    mean: Colour = IMAGENET.mean
    std: Colour = IMAGENET.std
    interpolation: str = IMAGENET.interpolation


PRESETS = {
    "custom": Preset(("dense", "uniform", "middle"), ("none", "all", "swap"), clips=5, crops=3),
    "kinetics": Preset(("dense",), ("all", "none"), clips=5, crops=3),
    "ssv2": Preset(("uniform",), ("none", "swap"), clips=2, crops=3),
    "imagenet": Preset(("middle",), ("all", "none"), clips=1, crops=1, crop_ratio=0.875),
    "ava": Preset(("dense",), ("all", "none"), clips=1, crops=1),
    "demo": Preset(("dense", "middle"), ("swap", "none"), clips=2, crops=3),
}


def resolve(config: Config) -> Config:
    """The same settings with the preset's filled in. Raises ConfigError on a contradiction.

    Sampling and flip are a data set's nature, and must be among the preset's; views are the caller's, and
    pixels belong to the weights: of them the preset has only what is not set. Where `model.weights` may
    say more, `data.mean`, `data.std` and `data.interpolation` are left to `settle_pixels`.
    """
    preset, data = PRESETS[config.data.preset], {}
    if TASKS[config.task].has_head:
        flips = tuple(dict.fromkeys((*preset.flips, "all", "none", "swap")))
        preset = dataclasses.replace(preset, flips=flips, clips=1, crops=1)
    for key, allowed in (("sampling", preset.samplings), ("flip", preset.flips)):
        data[key] = getattr(config.data, key) or allowed[0]
        if data[key] not in allowed:
            raise ConfigError(
                f"data.{key}={data[key]} contradicts data.preset={config.data.preset}, which has "
                f"{' or '.join(allowed)} (data.preset=custom leaves it free)"
            )
    views = {}
    for key in ("clips", "crops", "crop_ratio"):
        value = getattr(config.eval, key)
        views[key] = getattr(preset, key) if value is None else value
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **data),
        eval=dataclasses.replace(config.eval, **views),
    )
    if config.model.weights is None:
        config = settle_pixels(config, None)
    try:
        bounds.check(Config, vars(config))
        for group in GROUPS:
            values = getattr(config, group)
            bounds.check(type(values), vars(values), prefix=f"{group}.")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.train.steps and config.train.schedule != "steps":
        raise ConfigError(
            f"train.steps={list(config.train.steps)}: train.schedule={config.train.schedule} has none; "
            "with train.schedule=steps the rate falls there"
        )
    for key in ("scale", "ratio"):
        low, high = getattr(config.data, key)
        if low > high:
            raise ConfigError(f"data.{key}={[low, high]}: from {low} to {high} is empty")
    return config


def settle_pixels(config: Config, pixels: Pixels | None) -> Config:
    """`data.mean`, `data.std`, `data.interpolation`: where they are auto, the weights' or the preset's."""
    source = pixels or PRESETS[config.data.preset]
    values = {key: getattr(config.data, key) for key in Pixels._fields}
    values = {k: getattr(source, k) if v in ("auto", None) else v for k, v in values.items()}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **values))


def task_settings(config: Config) -> dict[str, Any]:
    """The settings that only this task has."""
    return {
        field.name: getattr(config.train, field.name)
        for field in dataclasses.fields(TASKS[config.task].settings)
    }


def refuse_idle_scoring(config: Config) -> None:
    """Raises ConfigError for a setting of `eval` that is set, and that only other tasks have."""
    scoring = TASKS[config.task].scoring
    for setting in itertools.chain(*map(dataclasses.fields, _TASK_SCORING)):
        name, value = setting.name, getattr(config.eval, setting.name)
        if value != setting.default and not hasattr(scoring, name):
            raise ConfigError(f"eval.{name}={value}: task={config.task} is scored without it")


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested values, as a checkpoint and `config.yaml` hold them."""
    return _plain(dataclasses.asdict(config))


def from_dict(values: dict[str, Any], source: str) -> Config:
    """What `to_dict` gave, also an earlier version's, checked like any other input.

    source: names it in errors.
    """
    parser, values = make_parser(""), upgrade(values)
    _check_keys(values, parser, source)
    try:
        return _instantiate(parser.parse_object(values))
    except ArgumentError as error:
        raise ConfigError(f"{source}: {_one_line(error)}") from None


def upgrade(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version under today's names."""
    train = dict(values.get("train") or {})
    if "bf16" not in train:
        return values
    precision = {None: "auto", True: "bf16", False: "fp32"}[train.pop("bf16")]
    return values | {"train": train | {"precision": precision}}


def make_parser(description: str) -> ArgumentParser:
    """A parser with a flag for every key of `Config`, and `--cfg FILE`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        description=description, exit_on_error=False, allow_abbrev=False, default_meta=False
    )
    parser.add_argument(
        "--cfg",
        action="config",
        metavar="FILE",
        help="Settings in YAML: a file, or a recipe's name, as demo_stvit.",
    )
    parser.add_class_arguments(Config, instantiate=False)
    for action in parser._actions:
        if hint := getattr(action, "_typehint", None):  # help shows plain types: bounds are checked later
            action._typehint = get_type_hints(type("", (), {"__annotations__": {"hint": hint}}))["hint"]
    return parser


def parse(parser: ArgumentParser, args: Sequence[str]) -> tuple[Config, Namespace]:
    """Command line -> Config, and the namespace with whatever else the parser knows.

    The namespace's `asked` are the keys that the command line itself names.
    Raises ConfigError naming the file or the command line, the key, and the nearest known key.
    """
    known = _known_keys(parser)
    files, flags, asked, words = [], [], set(), list(args)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and key not in known | {"help", "print_config"}:
            raise ConfigError(f"command line: {_unknown(key, known)}")
        asked |= {key} if word.startswith("--") else set()
        if word.startswith("--cfg"):
            files.append(value if equals or not words else words.pop(0))
        else:
            if value.endswith(".tar") and any(flag.startswith(f"--{key}=") for flag in flags):
                raise ConfigError(
                    f"command line: {key} is given twice; quote a pattern, or the shell expands its braces"
                )
            flags.append(word)
    files = [_recipe(file) for file in files]
    for file in files:
        _check_file(file)
    try:  # files first: a flag wins over them wherever it stands
        namespace = parser.parse_args([*(f"--cfg={file}" for file in files), *flags])
    except ArgumentError as error:
        raise ConfigError(f"command line: {_one_line(error)}") from None
    namespace.asked = asked
    return _instantiate(namespace), namespace


def _recipe(name: str) -> str:
    """A file as it is; else of a packaged recipe's name, as "k400_stvit", its path. Raises ConfigError."""
    if not name or Path(name).is_file() or Path(name).name != name:
        return name
    recipes = {path.stem: str(path) for path in CONFIGS.glob("*.yaml")}
    if name.removesuffix(".yaml") not in recipes:
        raise ConfigError(f"--cfg {name}: no file here, and no recipe{nearest(name, recipes)}")
    return recipes[name.removesuffix(".yaml")]


class _Plain(yaml.SafeLoader):
    """Plain values only: a tag that names code is an error. So is a key that stands there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[0]} stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _check_file(path: str) -> None:
    parser = make_parser("")  # without a command's own flags, which are no settings
    try:
        with open(path) as file:
            values = yaml.load(file, _Plain)
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, no day of a month
        raise ConfigError(f"{path}: not a readable YAML file: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {values!r} is not a mapping of keys to values")
    _check_keys(values, parser, path)
    try:
        parser.parse_object(values)
    except ArgumentError as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from None


def _check_keys(values: dict[str, Any], parser: ArgumentParser, source: str) -> None:
    known = _known_keys(parser) - {"cfg"}  # one file does not draw in another
    try:
        flat = _flat(values)
    except RecursionError:
        raise ConfigError(f"{source}: a mapping in it holds itself") from None
    for key, value in flat.items():
        if key not in known:
            raise ConfigError(f"{source}: {_unknown(key, known)}")
        if isinstance(value, str) and "${" in value:
            raise ConfigError(f"{source}: {key}={value}: settings are plain values, nothing is filled in")


def _unknown(key: str, known: Collection[str]) -> str:
    if key == "train.bf16":
        return "train.bf16 is now train.precision: auto, fp32, bf16 or fp16"
    return f"unknown key {key}{nearest(key, known)}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        key = f"{prefix}{key}"
        flat |= _flat(value, key + ".") if isinstance(value, dict) else {key: value}
    return flat


def _known_keys(parser: ArgumentParser) -> set[str]:
    names = {name.removeprefix("--") for action in parser._actions for name in action.option_strings}
    return names - GROUPS.keys() - {"-h", "help", "print_config"}


def _instantiate(namespace: Namespace) -> Config:
    values = namespace.clone(with_meta=False)
    single = {f.name: values[f.name] for f in dataclasses.fields(Config) if f.name not in GROUPS}
    return Config(**single, **{name: kind(**vars(values[name])) for name, kind in GROUPS.items()})


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
