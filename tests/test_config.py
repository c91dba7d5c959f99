import dataclasses
import typing

import pytest
import torch
import yaml

from stvit_video import build
from stvit_video.adapters import Pixels
from stvit_video.config import (
    PRESETS,
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    ModelConfig,
    TrainConfig,
    from_dict,
    make_parser,
    parse,
    resolve,
    settle_pixels,
    to_dict,
)


def read(*args):
    return parse(make_parser("test"), args)[0]


@pytest.fixture
def settings(tmp_path):
    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_the_command_line_overrides_the_file(settings):
    file = settings("model: {embed_dim: 96, semantic_tokens: [4, 2, 2]}\ntrain: {lr: 5e-4}\n")
    config = read("--cfg", file, "--train.lr", "1e-3", "--data.rand_augment=[2, 7]")
    assert config.model.embed_dim == 96
    assert config.model.sizes() == {"embed_dim": 96, "semantic_tokens": (4, 2, 2)}
    assert config.train.lr == 1e-3
    assert config.data.rand_augment == (2, 7)
    assert read("--model.semantic_tokens", "null").model.sizes() == {"semantic_tokens": None}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {lrr: 3}", ["settings.yaml", "train.lrr", "train.lr"]),
        ("trian: {lr: 3}", ["settings.yaml", "trian.lr", "train.lr"]),
        ("train: {lr: fast}", ["settings.yaml", "train.lr", "fast"]),
        ("- a list", ["settings.yaml", "mapping"]),
        ("train: [", ["settings.yaml", "YAML"]),
        ("data: {decoder: gstreamer}", ["settings.yaml", "data.decoder", "gstreamer"]),
        ("model: {class_path: os.system}", ["settings.yaml", "model.class_path"]),
        ("model: {class_path: os.system, init_args: {command: id}}", ["unknown key model.class_path"]),
        ("model: {name: {class_path: os.system}}", ["unknown key model.name.class_path"]),
        ("data: {mean: [{class_path: os.system}, 0, 0]}", ["settings.yaml", "data.mean"]),
        ("class_path: os.system", ["unknown key class_path"]),
        ("!!python/object/apply:os.system ['id']", ["settings.yaml", "YAML", "python/object/apply"]),
        ("output: !!python/object/apply:os.system ['id']", ["settings.yaml", "YAML", "os.system"]),
        ("output: !!python/name:os.system", ["settings.yaml", "YAML", "python/name"]),
        ("output: !!python/module:os", ["settings.yaml", "YAML", "python/module"]),
        ("output: ${HOME}/runs", ["settings.yaml", "output=${HOME}/runs", "plain values"]),
        ("train: {lr: '${oc.env:LR}'}", ["settings.yaml", "train.lr", "plain values"]),
        (
            "train: {lr: 1}\ndata: {stride: 2}\ntrain: {ema: 0.9}",
            ["settings.yaml", "train stands there twice"],
        ),
        ("data: {stride: 2, mean: auto, stride: 4}", ["settings.yaml", "stride stands there twice"]),
        ("output: 2026-02-30", ["settings.yaml", "YAML", "day is out of range"]),
        ("cfg: other.yaml", ["unknown key cfg"]),
        ("model: &a {x: *a}", ["settings.yaml", "holds itself"]),
    ],
)
def test_errors_in_a_file_name_file_and_key(settings, text, parts):
    """Among them: settings are data, and nothing in a file can name code to import or run."""
    with pytest.raises(ConfigError) as error:
        read("--cfg", settings(text))
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--train.lrr", "3"], ["command line", "train.lrr", "train.lr"]),
        (["--train.bf16", "true"], ["command line", "train.bf16 is now train.precision"]),
        (["--train.epochs", "many"], ["command line", "train.epochs", "many"]),
        (["--cfg", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--cfg"], ["YAML"]),
    ],
)
def test_errors_on_the_command_line(args, parts):
    with pytest.raises(ConfigError) as error:
        read(*args)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["os.system", "torch.load", "stvit_video.cli.train", "__import__('os')"])
def test_a_model_is_a_name_of_the_zoo(settings, name):
    config = resolve(read("--cfg", settings(yaml.safe_dump({"model": {"name": name}}))))
    with pytest.raises(ConfigError, match="model: .*unknown model") as error:
        build.build_model(config, 3)
    assert "\n" not in str(error.value)


def test_no_setting_takes_an_object():
    """Every value is a string, a number, a flag, null or a tuple of these: jsonargparse imports nothing."""
    plain = (str, int, float, bool, type(None), ...)

    def check(hint):
        arguments = typing.get_args(hint)
        if typing.get_origin(hint) is typing.Literal:
            return
        assert hint in (*plain, ...) or arguments, hint
        for argument in arguments:
            check(argument)

    for kind in (ModelConfig, DataConfig, EvalConfig, TrainConfig):
        for hint in typing.get_type_hints(kind).values():
            check(hint)


def test_help_tells_every_key(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out
    for group in dataclasses.fields(Config):
        kind = group.default_factory
        for field in [] if kind is dataclasses.MISSING else dataclasses.fields(kind):
            assert f"--{group.name}.{field.name} " in text
    assert "Largest norm of the gradient" in " ".join(text.split())
    assert "(type: int, default: 2)" in " ".join(text.split())
    assert "Annotated" not in text


def test_presets_fill_in_what_is_not_set():
    config = resolve(Config(data=DataConfig(preset="ssv2")))
    assert (config.data.sampling, config.data.flip) == ("uniform", "none")
    assert (config.eval.clips, config.eval.crops) == (2, 3)
    config = resolve(Config(data=DataConfig(preset="kinetics")))
    assert (config.data.sampling, config.data.flip) == ("dense", "all")
    assert config.data.mean == (0.485, 0.456, 0.406)
    assert resolve(config) == config


@pytest.mark.parametrize(
    "data",
    [
        {"preset": "ssv2", "flip": "all"},
        {"preset": "ssv2", "sampling": "dense"},
        {"preset": "kinetics", "flip": "swap"},
    ],
)
def test_contradicting_a_preset_is_an_error(data):
    with pytest.raises(ConfigError, match="contradicts data.preset"):
        resolve(Config(data=DataConfig(**data)))
    resolve(Config(data=DataConfig(**data | {"preset": "custom"})))


@pytest.mark.parametrize("preset", PRESETS)
def test_views_and_pixels_are_free_with_every_preset(preset):
    data = DataConfig(preset=preset, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    config = resolve(Config(data=data, eval=EvalConfig(clips=10, crops=1, crop_ratio=0.9)))
    assert (config.eval.clips, config.eval.crops, config.eval.crop_ratio) == (10, 1, 0.9)
    assert (config.data.mean, config.data.std) == (data.mean, data.std)


def test_pixels_are_left_to_the_weights_where_there_are_some():
    config = resolve(Config(data=DataConfig(preset="kinetics"), model=ModelConfig(weights="x.pth")))
    assert config.data.mean == "auto"
    assert settle_pixels(config, None).data.mean == (0.485, 0.456, 0.406)
    assert settle_pixels(config, Pixels((0.5,) * 3, (0.4,) * 3)).data.std == (0.4,) * 3


def test_ssv2_may_swap():
    assert resolve(Config(data=DataConfig(preset="ssv2", flip="swap"))).data.flip == "swap"


def test_values_that_make_no_sense():
    for key, value in (
        ("train.batch_size", "0"),
        ("train.log_every", "0"),
        ("train.betas", "[2, 3]"),
        ("train.label_smoothing", "2"),
        ("data.rand_augment", "[2, 11]"),
        ("data.std", "[0, 0, 0]"),
        ("model.drop_path", "2"),
        ("seed", "-1"),
        ("seed", "99999999999999999999999"),
    ):
        with pytest.raises(ConfigError, match=rf"{key}=.*: must lie between"):
            resolve(read(f"--{key}", value))
    with pytest.raises(ConfigError, match=r"data.scale=.*is empty"):
        resolve(read("--data.scale", "[0.9, 0.2]"))
    with pytest.raises(ConfigError, match=r"train.steps=\[2\]: train.schedule=cosine has none"):
        resolve(read("--train.steps", "[2]"))
    assert resolve(read("--train.steps", "[2]", "--train.schedule", "steps")).train.steps == (2,)


def test_a_flag_wins_over_a_file_wherever_it_stands(settings):
    file = settings("train: {lr: 5e-4}")
    assert read("--train.lr", "1", "--cfg", file).train.lr == 1
    assert read(f"--cfg={file}", "--train.lr=1").train.lr == 1


def test_settings_survive_a_checkpoint(tmp_path):
    config = resolve(read("--data.preset", "kinetics", "--model.patch_size", "[2, 8, 8]"))
    torch.save(to_dict(config), tmp_path / "config.pt")
    assert from_dict(torch.load(tmp_path / "config.pt", weights_only=True), "it") == config
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config))), "it") == config
    with pytest.raises(ConfigError, match=r"old.pt: unknown key model.widht"):
        from_dict({"model": {"widht": 3}}, "old.pt")


def test_sizes_that_do_not_fit_name_the_model():
    with pytest.raises(ConfigError, match=r"model: .*15 frames.*tubelets of 2"):
        build.build_model(read("--data.num_frames", "15"), 3)
    with pytest.raises(ConfigError, match="model: ptv_x3d_m takes no size 'depth'"):
        build.build_model(read("--model.name", "ptv_x3d_m", "--model.depth", "3"), 3)


def test_class_names_come_from_the_list_and_bound_it(tmp_path):
    (tmp_path / "list.txt").write_text("a.mp4 0\nb.mp4 4\n")
    config = resolve(Config(data=DataConfig(train=str(tmp_path / "list.txt"))))
    assert build.read_split(config, "train")[1] == ["0", "1", "2", "3", "4"]
    config.data.num_classes = 4
    with pytest.raises(ConfigError, match=r"label 4 of .*b.mp4: must be below 4"):
        build.read_split(config, "train")
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    config.data.num_classes, config.data.class_names = None, str(tmp_path / "names.txt")
    with pytest.raises(ValueError, match="list.txt"):
        build.read_split(config, "train")
    with pytest.raises(ConfigError, match="data.val is not set"):
        build.read_split(config, "val")


def test_swap_needs_names_that_say_left_or_right(tmp_path):
    (tmp_path / "list.txt").write_text("a.mp4 0\nb.mp4 1\n")
    data = DataConfig(preset="ssv2", flip="swap", train=str(tmp_path / "list.txt"))
    config = resolve(Config(data=data))
    with pytest.raises(ConfigError, match=r"data.flip=swap: .*data.class_names"):
        build.build_job(config, torch.device("cpu"))


def test_own_clips_may_use_the_demo_preset(tmp_path):
    (tmp_path / "test" / "grow").mkdir(parents=True)
    (tmp_path / "test" / "grow" / "mine.mp4").write_text("")
    data = DataConfig(preset="demo", test=str(tmp_path / "test"))
    assert len(build.read_split(resolve(Config(data=data)), "test")[0]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["test"]


def test_class_names_may_be_numbered(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("1 move left\n0 grow\n2,turn\n")
    assert build.read_names(str(path)) == ["grow", "move left", "turn"]
    path.write_text("1 move left\n1 grow\n")
    assert build.read_names(str(path)) == ["1 move left", "1 grow"]


def test_a_recipe_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("k400_stvit", "k400_stvit.yaml"):
        assert parse(make_parser(""), ["--cfg", name])[0].data.preset == "kinetics"
    (tmp_path / "k400_stvit").write_text("seed: 7")
    assert parse(make_parser(""), ["--cfg", "k400_stvit"])[0].seed == 7, "the file here comes first"
    with pytest.raises(ConfigError, match=r"--cfg k400_stvti: no file here, and no recipe .*'k400_stvit'"):
        parse(make_parser(""), ["--cfg", "k400_stvti"])
    with pytest.raises(ConfigError, match="not a readable YAML file"):
        parse(make_parser(""), ["--cfg", "./k400_stvit_swin.yaml"])


@pytest.mark.parametrize(
    ("recipe", "epochs", "lr", "layer_decay", "videos", "weight_decay", "dropout"),
    [  # VideoMAE's scripts of each size: epochs, lr for 256, videos an update; Video Swin-T's config
        ("k400_stvit", 150, 5e-4, 0.75, 384, 0.05, "auto"),
        ("k400_stvit_base", 75, 5e-4, 0.75, 384, 0.05, "auto"),
        ("k400_stvit_large", 35, 2e-3, 0.75, 128, 0.05, "auto"),
        ("ssv2_stvit", 40, 1e-3, 0.7, 384, 0.05, "auto"),
        ("ssv2_stvit_base", 30, 5e-4, 0.75, 384, 0.05, "auto"),
        ("k400_stvit_swin", 30, 4e-4, None, 64, 0.02, 0.5),
    ],
)
def test_recipes_have_the_published_numbers_of_their_size(
    recipe, epochs, lr, layer_decay, videos, weight_decay, dropout
):
    config = read("--cfg", recipe)
    train, size = config.train, recipe.rpartition("_")[2]
    assert (train.epochs, train.layer_decay, train.weight_decay) == (epochs, layer_decay, weight_decay)
    assert train.lr * 256 / train.lr_per == pytest.approx(lr)
    assert train.batch_size * train.accumulate * 8 == videos  # on 8 ranks
    assert config.model.dropout == dropout
    name = {"stvit": "stvit_small", "swin": "stvit_video_swin_tiny"}.get(size, f"stvit_{size}")
    assert config.model.name.startswith(name)
    vit = recipe != "k400_stvit_swin"
    assert (config.data.rand_augment, config.data.repeats) == (((4, 7), 2) if vit else (None, 1))


def test_a_loader_makes_as_many_batches_ahead_as_is_set(demo_root):
    data = DataConfig(train=f"{demo_root}/train", prefetch=5, workers=2)
    config = resolve(Config(data=data))
    rows, names = build.read_split(config, "train")
    loader = build.build_train_loader(config, build.build_task(config, names), rows, torch.device("cpu"))
    assert loader.prefetch_factor == 5
