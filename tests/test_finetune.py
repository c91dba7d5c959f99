"""One's own videos in one command: which model weights are of, where they come from, what is held back."""

import json
import shlex
from collections import Counter
from dataclasses import replace

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from test_end_to_end import run
from test_weights import checkpoint as saved
from test_weights import own_checkpoint, reference, settled, video

from stvit_video import WeightsError, build, cli, create_model, load_weights
from stvit_video.cli import training
from stvit_video.cli.serving import validated
from stvit_video.config import Config, ConfigError, DataConfig, ModelConfig, make_parser, parse, resolve
from stvit_video.data.key_frames import KeyFrame
from stvit_video.data.masks import Masks
from stvit_video.data.objects import Objects
from stvit_video.data.rows import Row, Rows
from stvit_video.engine import checkpoint
from stvit_video.errors import InputError
from stvit_video.files import write_torch
from stvit_video.recognizer import load_model
from stvit_video.resume import model_of_run
from stvit_video.weights import model_of

CLIP = ["--data.num_frames=4", "--data.image_size=32", "--model.semantic_tokens=[2, 2, 2]"]


# ---- which model


@pytest.mark.parametrize(
    ("theirs", "frames", "ours"),
    [
        ("vit_tiny_patch16_224", 16, {"name": "stvit_tiny_patch16_224", "patch_size": (2, 16, 16)}),
        ("vit_small_patch32_224", 16, {"name": "stvit_small_patch16_224", "patch_size": (2, 32, 32)}),
        ("vit_base_patch16_224", 1, {"name": "stvit_base_patch16_224", "patch_size": (1, 16, 16)}),
        ("swin_small_patch4_window7_224", 16, {"name": "stvit_video_swin_small"}),
        ("swin_tiny_patch4_window7_224", 1, {"name": "stvit_swin_tiny"}),
    ],
)
def test_the_model_of_timms_weights_takes_all_of_them(theirs, frames, ours):
    with torch.device("meta"):
        shapes = timm.create_model(theirs, num_classes=7).state_dict()
    state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in shapes.items()}
    sizes = model_of(state, num_frames=frames)
    assert ours.items() <= sizes.items()
    model = create_model(**sizes, num_classes=7, num_frames=frames, semantic_tokens=(1, 2, 2))
    report = load_weights(model, state)
    assert {*report.fresh} <= {"semantic.centres"}


def test_the_model_of_videomaes_weights_has_their_positions():
    mae, _ = reference("videomae_vit")
    with pytest.raises(WeightsError, match="layers, 4 of them, 48 wide, .* give model.name"):
        model_of(mae, num_frames=8)
    wide = create_model("vit_tiny_patch16_224", num_classes=5, pos_embed="sincos").state_dict()
    for i in range(12):
        wide[f"blocks.{i}.attn.q_bias"] = wide.pop(f"blocks.{i}.attn.qkv.bias")[:192]
        wide[f"blocks.{i}.attn.v_bias"] = wide[f"blocks.{i}.attn.q_bias"]
    assert model_of(wide, num_frames=16)["pos_embed"] == "sincos"


def test_layers_without_an_ordinary_mlp_are_one_line():
    eva = {
        k.replace("fc1.", "fc1_g."): t
        for k, t in timm.create_model("vit_tiny_patch16_224").state_dict().items()
    }
    with pytest.raises(WeightsError, match=r"^state dict: its layers have no mlp.fc1, [^\n]*$"):
        model_of(eva, num_frames=1)


def test_the_model_of_a_checkpoint_is_what_it_was_built_with():
    values = own_checkpoint() | {"built": video().built}
    sizes = model_of(values, num_frames=4)
    assert create_model(**sizes, num_classes=5, num_frames=4, image_size=32).built == values["built"]
    of_images = {"built": video(num_frames=1, patch_size=(1, 8, 8), semantic_tokens=(1, 2, 2)).built}
    model = video(num_frames=1, patch_size=(1, 8, 8), semantic_tokens=(1, 2, 2))
    values |= of_images | {"model": model.state_dict()}
    sizes = model_of(values, num_frames=16)
    assert (sizes["patch_size"], sizes["semantic_tokens"]) == ([2, 8, 8], [8, 2, 2])


def test_sizes_that_are_set_stay(tmp_path):
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit.safetensors")
    args = ["--model.name=auto", f"--model.weights={tmp_path}/vit.safetensors", "--model.pool=avg"]
    model = build.with_model(resolve(parse(make_parser(""), args)[0])).model
    assert (model.name, model.pool) == ("stvit_tiny_patch16_224", "avg")
    with pytest.raises(ConfigError, match="model.name=auto is the model of model.weights: give"):
        build.build_model(resolve(parse(make_parser(""), ["--model.name=auto"])[0]), 3)


@pytest.mark.parametrize(
    ("theirs", "task", "head", "ours", "exits"),
    [
        ("linear", "segmentation", "auto", "linear", [2]),
        ("atm", "segmentation", "auto", "atm", [2]),
        ("linear", "segmentation", "atm", "atm", [2]),
        ("linear", "segmentation", "upernet", "upernet", "auto"),
        ("linear", "classification", "auto", None, "auto"),
        ("policy", "segmentation", "linear", "linear", "auto"),
        (None, "segmentation", "auto", "linear", "auto"),
    ],
)
def test_the_task_and_head_that_are_asked_for_stand(tmp_path, theirs, task, head, ours, exits):
    """On the layers of any checkpoint; its other head goes, and the sizes that only that has."""
    clip, names = {"num_frames": 1, "image_size": 32}, ["a", "b", "c"]
    tiny = {"patch_size": (1, 8, 8), "embed_dim": 24, "depth": 4, "num_heads": 2}
    more = {"policy": {"superpatches": "dcts"}, "linear": {"exits": [2]}, "atm": {"exits": [2]}}
    sizes = clip | tiny | more.get(theirs, {})
    donor = create_model("vit_tiny_patch16_224", num_classes=3, head=theirs, **sizes)
    values = saved(donor, Config(data=DataConfig(**clip)), names) | {"built": donor.built}
    write_torch(tmp_path / "theirs.pt", values)
    asked = ModelConfig(name="auto", head=head, weights=str(tmp_path / "theirs.pt"))
    config = build.with_model(Config(task=task, model=asked, data=DataConfig(**clip)))
    assert (config.model.head, config.model.exits) == (ours, exits)
    model = build.build_model(config, 3)
    assert model.built.get("head") == ours
    if theirs == "policy":
        return  # which has no layers
    report = build.load_pretrained(config, model, names)
    loaded, expected = (getattr(m, "backbone", m).blocks[1].mlp.fc1.weight for m in (model, donor))
    assert torch.equal(loaded, expected)
    assert any(name.startswith("head.exits.") for name in report.dropped) == (theirs not in (None, ours))


def test_weights_without_exits_leave_a_threshold_nothing_to_do(tmp_path):
    clip = {"num_frames": 1, "image_size": 32}
    donor = create_model("vit_tiny_patch16_224", num_classes=3, head="linear", depth=2, **clip)
    values = saved(donor, Config(data=DataConfig(**clip)), ["a", "b", "c"]) | {"built": donor.built}
    write_torch(tmp_path / "theirs.pt", values)
    asked = ModelConfig(name="auto", weights=str(tmp_path / "theirs.pt"), exit_threshold=0.5)
    config = Config(task="segmentation", model=asked, data=DataConfig(**clip))
    with pytest.raises(ConfigError, match="exit_threshold=0.5: without exits no token leaves"):
        build.with_checked_model(config)
    build.with_checked_model(replace(config, model=replace(asked, exits=[1])))


# ---- where weights come from


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the Hub that holds one model, and no network; -> its folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--them--vit"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    return folder / "snapshots" / "abc"


def test_weights_of_the_hub_come_from_its_cache(hub):
    model = video(depth=3, semantic_tokens=None)
    save_file({k: t + 1 for k, t in model.state_dict().items()}, hub / "model.safetensors")
    save_file({k: t + 2 for k, t in model.state_dict().items()}, hub / "other.safetensors")
    pixels = {"mean": [0.4] * 3, "std": [0.3] * 3, "interpolation": "bicubic"}
    (hub / "config.json").write_text(json.dumps({"pretrained_cfg": pixels}))
    for source, change in (("hf:them/vit", 1), ("hf:them/vit/other.safetensors", 2)):
        fresh = video(depth=3, semantic_tokens=None)
        report = load_weights(fresh, source)
        assert settled(report) == ((0.4,) * 3, (0.3,) * 3, "bicubic")
        for name, tensor in fresh.state_dict().items():
            torch.testing.assert_close(tensor, model.state_dict()[name] + change)
    (hub / "config.json").unlink()
    transformers = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3, "resample": 2}
    (hub / "preprocessor_config.json").write_text(json.dumps(transformers))
    assert settled(load_weights(fresh, "hf:them/vit")) == ((0.1,) * 3, (0.2,) * 3, "bilinear")


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("hf:them/nothing", "hf:them/nothing: not in the cache of .* cannot be reached"),
        ("hf:vit", "hf:vit: must be hf:OWNER/NAME"),
    ],
)
def test_the_hub_out_of_reach_is_one_line(hub, source, line):
    with pytest.raises(WeightsError, match=rf"^{line}[^\n]*$"):
        load_weights(video(), source)


# ---- what is held back


def test_a_share_of_each_class_is_held_back_by_the_seed():
    rows = Rows(Row(f"{i}.mp4", i % 3 % 2) for i in range(60))  # 40 of class 0, 20 of class 1
    rest, held = build.hold_back(rows, 0.1, seed=5)
    assert Counter(row.target for row in held) == {0: 4, 1: 2}
    assert sorted([*rest, *held], key=lambda row: int(row.path[:-4])) == list(rows)
    assert build.hold_back(rows, 0.1, seed=5)[1] == held != build.hold_back(rows, 0.1, seed=6)[1]
    more = Rows([*rows, *(Row(f"new{i}.mp4", 2) for i in range(10))])  # of another class
    assert list(build.hold_back(more, 0.1, seed=5)[1])[:-1] == list(held)
    with pytest.raises(ConfigError, match="of the 1 videos of class 'b' none would be left to train on"):
        build.hold_back(Rows([*rows, Row("a.mp4", 2)], ["c", "a", "b"]), 0.1, seed=5)


@pytest.mark.parametrize(
    "target",
    [
        lambda i: Masks(f"{i}.png"),
        lambda i: Objects(i, (8, 8), (i % 2,), ((0, 0, 1, i),)),
        lambda i: tuple(range(i % 7 + 1)),
        lambda i: None,
    ],
)
def test_rows_without_one_class_are_held_back_alike(target):
    rows = Rows((Row(f"{i}.jpg", target(i)) for i in range(40)), ["a", "b"], [3, 5])
    rest, held = build.hold_back(rows, 0.1, seed=5)
    assert (len(rest), len(held), held.category_ids) == (36, 4, [3, 5])
    with pytest.raises(ConfigError, match="of the 1 videos none would be left"):
        build.hold_back(Rows(rows[:1]), 0.1, seed=5)


def test_key_frames_of_a_video_are_held_back_together():
    rows = Rows(Row(f"{i % 10}.mp4", KeyFrame(str(i % 10), i // 10)) for i in range(70))
    rest, held = build.hold_back(rows, 0.2, seed=5)
    assert (len(rest), len(held)) == (56, 14)
    assert not {row.path for row in rest} & {row.path for row in held}


def test_what_is_held_back_is_for_validation_where_no_list_is(demo_root):
    data = DataConfig(train=f"{demo_root}/train", hold_back=0.34)
    paths = {
        split: {row.path for row in build.read_split(resolve(Config(data=data)), split)[0]}
        for split in ("train", "val", "test")
    }
    assert paths["val"] == paths["test"]
    assert (len(paths["train"]), len(paths["val"])) == (16, 8)
    assert not paths["train"] & paths["val"]
    data.val = f"{demo_root}/test"
    assert len(build.read_split(resolve(Config(data=data)), "train")[0]) == 24


# ---- the command


FOLDERS = {
    "nested": (["clips/left/a.mp4", "clips/right/b.mp4"], "{0}: has only the class 'clips', .* takes two"),
    "empty": (["left/a.mp4", "right/notes.txt"], "{0}/right: found no video, image or frame folder"),
    "flat": (["a.mp4", "b.mp4"], "{0}: found no sub-folders, expected one for each class"),
    "one.mp4": ([""], "{0}: found a video or image, expected a list or a folder of them"),
    "absent": ([], "{0}: found no such file or folder, expected a list, class folders or shards"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_none_of_classes(tmp_path, name):
    """Each is refused before any video is opened."""
    files, line = FOLDERS[name]
    for file in files:
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    data = DataConfig(train=f"{tmp_path}/{name}", image_size=32, num_frames=4)
    model = ModelConfig(name="stvit_tiny_patch16_224", depth=6, embed_dim=48, semantic_tokens=(2, 1, 1))
    config = resolve(Config(model=model, data=data))
    with pytest.raises(InputError, match=f"^(data.train=)?{line.format(tmp_path / name)}[^\n]*$"):
        build.build_job(config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("more", "pool"), [({}, "merge"), ({"base_window": 2}, "grid"), ({"reducer": "pool"}, "avg")]
)
def test_a_start_that_goes_with_what_is_asked_for(tmp_path, more, pool):
    """Merged tokens lie on no grid, which chunks and pooling need."""
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=9, img_size=32)
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    model = ModelConfig(name="auto", weights=str(tmp_path / "vit.safetensors"), **more)
    config = build.with_model(Config(model=model, data=DataConfig(num_frames=8, image_size=32)))
    assert config.model.pool == pool
    build.build_model(replace(config, model=replace(config.model, semantic_tokens=(2, 1, 1))), 2)


def test_one_command_for_ones_own_videos(demo_root, tmp_path, capsys):
    """From a dense image ViT and one folder: trained, then scored by the command that is printed."""
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=9, img_size=32)
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    args = ["--cfg=finetune", f"--data.train={demo_root}/train", f"--output={tmp_path}/run", *CLIP]
    args += [f"--model.weights={tmp_path}/vit.safetensors", "--data.workers=0", "--device=cpu"]
    args += ["--train.epochs=10", "--train.eval_every=10"]
    assert run(cli.train, *args) == 0
    out, err = capsys.readouterr()
    assert "data.flip=all mirrors clips of 'move_left', too" in err
    assert "training on 16 videos of 8 classes (grow, move_down, move_left, ...): 10 epochs " in out
    assert "of 16 clips, 20 updates; validating on 8" in out
    assert "about 1 minutes, validations apart" in out
    assert "layer_decay" not in out + err
    state = checkpoint.load(tmp_path / "run" / "best.pt")
    assert state["built"]["name"] == state["config"]["model"]["name"] == "stvit_tiny_patch16_224"
    assert state["built"]["pool"] == "merge"
    held = {row.path for row in build.read_split(Config(data=DataConfig(
        train=f"{demo_root}/train", hold_back=0.1)), "val")[0]}  # fmt: skip
    score = next(line for line in out.splitlines() if line.startswith("score:"))
    words = shlex.split(score)[2:]
    assert run(cli.test, *words, f"--output={tmp_path}/scored") == 0
    lines = (tmp_path / "scored" / "predictions.csv").read_text().splitlines()[1:]
    assert {line.split(",")[0] for line in lines} == held
    config, *_ = load_model(tmp_path / "run" / "best.pt")
    assert {str(path) for path in validated(config)} == held
    (tmp_path / "vit.safetensors").unlink()
    assert run(cli.train, *args, "--resume") == 0


def test_contrast_is_of_the_pixels_that_the_weights_bring(demo_root, tmp_path):
    """Divided by 0.5 here; a run goes on, and a checkpoint scores, with what its model was built with."""
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=9, img_size=32)
    weights = tmp_path / "vit_tiny_patch16_224_in1k.safetensors"
    save_file(theirs.state_dict(), weights)
    args = [f"--data.train={demo_root}/train", f"--model.weights={weights}", *CLIP]
    args += ["--model.name=auto", "--model.superpatches=contrast", "--data.workers=0", "--device=cpu"]
    config = resolve(parse(make_parser(""), args)[0])
    job, _ = build.build_job(config, torch.device("cpu"))
    assert job.model.superpatches.std.tolist() == [0.5] * 3
    lines = torch.zeros(1, 3, 4, 32, 32)
    lines[..., ::2] = 0.1  # in units of 0 to 1: each pixel is 0.05 from the mean
    rows = job.model.superpatches._pixels(lines / 0.5, (2, 16, 16))
    scores = dict(
        zip(job.model.superpatches.shapes, job.model.superpatches.scores(lines, rows), strict=True)
    )
    torch.testing.assert_close(scores[1, 2, 2], torch.full((1, 2), -0.05))
    state = job.details | {"model": job.model.state_dict(), "ema": None}
    for std, kept in (([0.5] * 3, [0.5] * 3), (None, [0.229, 0.224, 0.225])):  # None: of older versions
        state["built"] = state["built"] | {"superpatch_std": std}
        checkpoint.save(tmp_path / "last.pt", state)
        torch.testing.assert_close(load_model(tmp_path / "last.pt")[2].superpatches.std.tolist(), kept)
        again = model_of_run(build.with_pixels(config, None), state)
        resumed, _ = build.build_job(again, torch.device("cpu"), pretrained=False)
        torch.testing.assert_close(resumed.model.superpatches.std.tolist(), kept)
        assert resumed.details["built"] == state["built"]
    dense = job.details["built"] | {"superpatches": None, "superpatch_std": None}
    values = {
        "model": create_model(**dense).state_dict(),
        "ema": None,
        "built": dense,
        "format": checkpoint.FORMAT,
    }
    torch.save(state | values, tmp_path / "dense.pt")
    model = replace(config.model, weights=str(tmp_path / "dense.pt"))
    assert build.with_model(replace(config, model=model)).model.superpatch_std == "auto"


@pytest.mark.parametrize(("decay", "told"), [(0.75, True), (1.0, False), (None, False)])
def test_layer_decay_of_random_weights_is_told(demo_root, tmp_path, decay, told):
    args = [f"--data.train={demo_root}/train", f"--train.layer_decay={json.dumps(decay)}", *CLIP]
    config, _ = parse(make_parser(""), [*args, "--model.name=stvit_tiny_patch16_224", "--device=cpu"])
    job, _ = build.build_job(resolve(config), torch.device("cpu"))
    line = "train.layer_decay=0.75 is for pretrained weights, and there is no model.weights"
    assert (line in training._plan(job, config)) == told
