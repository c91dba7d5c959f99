"""First contact: what is wrong, and what most likely helps, in one line."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_end_to_end import run, settings, trained  # noqa: F401

from stvit_video import build, cli, create_model
from stvit_video.cli import prediction
from stvit_video.cli.common import videos_of
from stvit_video.cli.training import _next_steps
from stvit_video.config import Config, ConfigError, DataConfig, ModelConfig, make_parser, parse, resolve
from stvit_video.data.media import VIDEO_SUFFIXES
from stvit_video.data.rows import Row
from stvit_video.engine.evaluate import write_report
from stvit_video.engine.job import Outcome
from stvit_video.engine.logs import progress
from stvit_video.errors import InputError, nearest
from stvit_video.files import FileError, read_torch
from stvit_video.models.zoo import changed_sizes
from stvit_video.tasks.classification import Classification


def test_a_list_is_predicted_like_its_videos(trained, demo_root, tmp_path, capsys):  # noqa: F811
    clips = sorted(map(str, demo_root.glob("test/*/*.mp4")))[:3]
    (tmp_path / "list.csv").write_text("".join(f"{clip} {i}\n" for i, clip in enumerate(clips)))
    (tmp_path / "bare.txt").write_text("\n".join(clips))
    said = []
    for source in ([tmp_path / "list.csv"], [tmp_path / "bare.txt"], clips):
        args = ["--checkpoint", trained[0] / "best.pt", "--device=cpu", "--json", *source]
        assert run(cli.predict, *args) == 0
        said.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert said[0] == said[1] == said[2]
    assert len(said[0]) == 3


def test_a_folder_of_nothing_is_named_so(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(InputError, match=r"a folder without videos \(.3gp, .*\) or frames"):
        videos_of(tmp_path, VIDEO_SUFFIXES)
    (tmp_path / "img_1.jpg").touch()
    assert videos_of(tmp_path, VIDEO_SUFFIXES) == [tmp_path]


@pytest.mark.parametrize(
    ("line", "root", "hint"),
    [
        ("a/{name} 0", "a", "it is there with data.root={root}"),
        ("{name} 0", "", "it is there with data.root={root}/a"),
        ("7 a/{name} 0", "", "lines begin with a number"),
        ("'{name}' 0", "a", "paths stand in single quotes"),
    ],
)
def test_a_list_of_nothing_that_is_there(tmp_path, capsys, line, root, hint):
    (tmp_path / "a").mkdir()
    for i in range(20):
        (tmp_path / "a" / f"{i}.mp4").touch()
    (tmp_path / "list.txt").write_text("".join(line.format(name=f"{i}.mp4") + "\n" for i in range(20)))
    data = DataConfig(train=f"{tmp_path}/list.txt", root=f"{tmp_path}/{root}".rstrip("/"))
    build.read_split(resolve(Config(data=data)), "train")
    warning = capsys.readouterr().err
    assert "none of the 16 videos looked for is there, the first:" in warning
    assert warning.endswith(f"; {hint.format(root=tmp_path)}\n")
    data.root = str(tmp_path)
    (tmp_path / "list.txt").write_text("".join(f"{i}.mp4 0\na/{i}.mp4 0\n" for i in range(20)))
    build.read_split(resolve(Config(data=data)), "train")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "twin"),
    [("vit_small_patch16_224", "stvit_small_patch16_224"), ("video_swin_tiny", "stvit_video_swin_tiny")],
)
def test_a_size_that_another_model_has_is_left_out_by_auto(name, twin):
    args = ["--cfg=k400_stvit", f"--model.name={name}"]
    line = rf"takes no size 'semantic_tokens' \({twin} does\): model.semantic_tokens=auto"
    with pytest.raises(ConfigError, match=line):
        build.build_model(parse(make_parser(""), args)[0], 3)


def test_sizes_that_are_not_those_of_the_name_stand_beside_it():
    sizes = {"image_size": 32, "num_classes": 3}
    assert changed_sizes(create_model("stvit_tiny_patch16_224", **sizes, semantic_tokens=(8, 2, 2))) == {
        "semantic_tokens": [8, 2, 2]
    }
    model = create_model("vit_tiny_patch16_224", **sizes, num_frames=1, depth=3)
    assert changed_sizes(model) == {"depth": 3}


def test_single_images_in_clips_of_several_frames_are_named(tmp_path, capsys):
    for name in ("a/1.jpg", "a/2.jpg", "b/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for frames, line in (
        (16, "all are single images, each 16 times in a clip; data.num_frames=1"),
        (1, ""),
    ):
        data = DataConfig(train=str(tmp_path), num_frames=frames, hold_back=0.5)
        for split in ("train", "val"):  # one list, so one warning
            build.read_split(resolve(Config(data=data)), split)
        warning = capsys.readouterr().err
        assert line in warning
        assert warning.count("\n") == bool(line)


def test_a_name_broken_off_suggests_what_begins_so():
    assert nearest("stvit_smal", ["stvit_swin_small", "stvit_small_patch16_224"]).endswith(
        "'stvit_small_patch16_224'?)"
    )


@pytest.mark.parametrize("classes", ["ab", "abcdef"])
def test_five_best_of_few_classes_are_no_result(tmp_path, classes):
    task = Classification(classes, normalise=None)
    scores = torch.eye(len(classes))
    records = [{"scores": s, "classes": s.argmax()[None]} for s in scores]
    outcome = Outcome([Row(f"{i}.mp4", i) for i in range(len(classes))], records, {})
    lines = write_report(
        tmp_path, task, outcome, views={"clips": 1, "crops": 1}, details={"on_failure": "wrong"}
    )
    assert any("top-5" in line for line in lines) == (len(classes) > 5)


def test_what_is_no_checkpoint_has_a_cause_in_words(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"i am no checkpoint")
    with pytest.raises(FileError, match=r"not a checkpoint \([A-Za-z]"):
        read_torch(tmp_path / "a.pth")
    with pytest.raises(FileError, match="a folder, not a file"):
        read_torch(tmp_path)


def test_features_go_where_they_are_told(trained, demo_root, tmp_path, capsys):  # noqa: F811
    args = ["--checkpoint", trained[0] / "best.pt", "x.mp4", f"--features={tmp_path}/g.txt"]
    assert run(cli.predict, *args) == 2
    assert "g.txt: must end in .npz" in capsys.readouterr().err


def test_features_are_written_whole(trained, demo_root, tmp_path, monkeypatch):  # noqa: F811
    def break_off(file, **features):
        file.write(b"half")
        raise KeyboardInterrupt

    clip, features = next(demo_root.glob("test/*/*.mp4")), tmp_path / "f.npz"
    features.write_bytes(b"before")
    monkeypatch.setattr(prediction.np, "savez", break_off)
    assert run(cli.predict, "--checkpoint", trained[0] / "best.pt", clip, f"--features={features}") == 130
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_bars_in_files_are_lines(capsys):
    for _ in progress(range(3), desc="epoch 1/2", unit="batch"):
        pass
    print("epoch 1: loss 0.5")
    lines = [line.strip() for line in capsys.readouterr().err.split("\n") if line.strip()]
    assert lines
    assert all(line.startswith("epoch 1/2: ") and line.count("epoch") == 1 for line in lines)


def test_the_commands_to_go_on_with_can_be_pasted():
    job = SimpleNamespace(val_loader=None)
    for word in _next_steps(job, Config(), Path("my run"), Path("my run/best.pt")).splitlines():
        assert shlex.split(word)[3] == "my run/best.pt"


@pytest.mark.parametrize("width", [10**9, 10**20])
def test_a_size_beyond_memory_is_one_line(width):
    with pytest.raises(ConfigError) as raised:
        build.build_model(resolve(Config(model=ModelConfig(embed_dim=width, num_heads=1))), 2)
    assert "\n" not in str(raised.value)
