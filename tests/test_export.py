"""A file to deploy: exported scores are the model's, and a video is recognised without the checkpoint."""

import re
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from test_end_to_end import run as run_command

from stvit_video import Recognizer, build, export, list_models
from stvit_video.cli import export as command
from stvit_video.config import Config, DataConfig, ModelConfig, resolve, to_dict
from stvit_video.data import demo
from stvit_video.engine import checkpoint
from stvit_video.errors import InputError
from stvit_video.models.tokens import highest_first

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CLASSES = list(demo.CLASSES)


def tiny(name):
    """Sizes with which a model of this name is small, and still does all that it does."""
    if name.startswith("ptv_"):
        return {"num_frames": 4, "image_size": 32}
    if "swin" not in name:
        sizes = {"num_frames": 2, "image_size": 24, "patch_size": (1, 8, 8), "embed_dim": 16, "depth": 2}
        if not name.startswith("vit_"):
            sizes |= {"semantic_tokens": (2, 2, 2), "base_depth": 0, "depth": 3}
        return sizes | {"num_heads": 2}
    frames = 4 if "video" in name else 1
    time = frames // 2 or 1
    sizes = {"num_frames": frames, "image_size": 48, "embed_dim": 8, "num_heads": [1, 1, 2, 2]}
    sizes |= {"window_size": (time, 2, 2), "depths": [1, 2, 2, 1]}
    if name.startswith("stvit"):
        sizes |= {"semantic_tokens": (time, 1, 2), "depths": [1, 2, 3, 1]}
        if name.startswith("stvit_r"):
            return sizes | {"depths": [1, 2, 6, 1]}
        return sizes | {"base_depth": 1}
    return sizes


def make(name, task="classification", **sizes):
    """A model whose scores differ from clip to clip, its task, and the settings that make both."""
    sizes = tiny(name) | sizes
    data = {key: sizes.pop(key) for key in ("num_frames", "image_size")}
    config = resolve(
        Config(model=ModelConfig(name=name, **sizes), data=DataConfig(preset="demo", **data), task=task)
    )
    torch.manual_seed(1)
    model = build.build_model(config, len(CLASSES)).eval()
    task = build.build_task(config, CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not name.startswith("ptv_"):
                parameter.mul_(3)
        head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
        logits = model(task.normalise(noise(config)))
        scale = 2 / logits.std(0).max()
        head.weight.mul_(scale)
        head.bias.copy_((head.bias - logits.mean(0)) * scale)
    return model, task, config


def noise(config, clips=5):
    size = config.data.image_size
    return torch.randint(256, (clips, 3, config.data.num_frames, size, size), dtype=torch.uint8)


def difference(path, name, precision="fp32", **sizes):
    model, task, config = make(name, **sizes)
    export.write(path, model, task, config, precision=precision)
    clips = noise(config)
    _, names, scores = export.read(path, CPU)
    assert names == CLASSES
    own = task.view_scores(model, clips[None])[0]
    assert own.std(0).max() > 0.1, "the scores say nothing of the clips"
    return max((scores(clips[:n]) - own[:n]).abs().max().item() for n in (1, 3, 5))  # traced with 2


FAST = [
    ("stvit_tiny_patch16_224", ".pt2"),  # its .onnx is `deployed`
    ("stvit_swin_tiny", ".pt2"),
    ("tome_vit_tiny_patch16_224", ".onnx"),
    ("random_vit_tiny_patch16_224", ".pt2"),
    ("pool_vit_tiny_patch16_224", ".pt2"),
    ("vit_tiny_patch16_224", ".pt2"),
    ("stvit_r_swin_small", ".pt2"),
]
SLOW = [
    (name, kind) for name in list_models() for kind in export.EXPORT_SUFFIXES if (name, kind) not in FAST
]


@pytest.mark.parametrize(
    ("name", "kind"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_scores_are_the_models_at_any_batch_size(name, kind, tmp_path):
    assert difference(tmp_path / f"model{kind}", name) < 1e-5


def test_a_joined_model_with_a_budget(tmp_path):
    """Superpatches, whose choice depends on the pixels, and merged semantic tokens, on theirs."""
    sizes = {
        "superpatches": "contrast",
        "superpatch_tokens": 13,
        "pool": "merge",
        "semantic_tokens": (2, 2, 1),
    }
    assert difference(tmp_path / "model.onnx", "stvit_tiny_patch16_224", **sizes) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("pool", "tokens"), [("max", (2, 2, 2)), ("avg", (2, 2, 2)), ("avg", (1, 3, 2))])
def test_pools_whose_cells_overlap(pool, tokens, tmp_path):
    sizes = {"pool": pool, "semantic_tokens": tokens}  # 2 of 3 rows: cells share the middle one
    assert difference(tmp_path / "model.onnx", "pool_vit_tiny_patch16_224", **sizes) < 1e-5


@pytest.mark.parametrize(
    ("size", "cells"), [((4, 6, 9), (2, 3, 3)), ((3, 5, 7), (2, 3, 7)), ((1, 4, 3), (1, 1, 2))]
)
def test_pooling_for_onnx_is_torchs(size, cells):
    x = torch.randint(9, (2, 3, *size)).float()  # many ties: the first place is taken
    values, places = export._adaptive_max_pool3d(x, cells)
    expected, expected_places = torch.nn.functional.adaptive_max_pool3d(x, cells, return_indices=True)
    assert torch.equal(values, expected)
    assert torch.equal(places, expected_places)
    averages = torch.nn.functional.adaptive_avg_pool3d(x, cells)
    torch.testing.assert_close(export._adaptive_avg_pool3d(x, cells), averages)


@pytest.mark.parametrize("kind", export.EXPORT_SUFFIXES)
def test_equal_values_keep_their_order(kind, tmp_path):
    """Of a still clip, or one with black bars, groups and tokens are alike to the last bit."""

    class Ordered(torch.nn.Module):
        forward = staticmethod(highest_first)

    x = torch.randint(3, (4, 300)).float()
    program = torch.export.export(Ordered(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    if kind == ".pt2":
        order = program.module()(x)
    else:
        export._write_onnx(tmp_path / "x.onnx", program, {"precision": "fp32"})
        session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
        order = torch.from_numpy(session.run(None, {"clips": x.numpy()})[0])
    assert np.array_equal(order, np.argsort(-x.numpy(), axis=1, kind="stable"))


run = partial(run_command, command)  # -> exit code


@pytest.fixture(scope="module")
def deployed(demo_root, tmp_path_factory):
    """A checkpoint with its list, and the files that the command made of it."""
    folder = tmp_path_factory.mktemp("deployed")
    model, _, config = make(
        "stvit_tiny_patch16_224", num_frames=4, image_size=48, patch_size=(2, 8, 8), embed_dim=24
    )
    config.data.val = str(demo_root / "test")
    config.data.stride = 3
    values = {"model": model.state_dict(), "ema": None, "class_names": CLASSES}
    values |= {"config": to_dict(config), "built": model.built}
    checkpoint.save(folder / "best.pt", values)
    for kind in export.EXPORT_SUFFIXES:
        assert run("--checkpoint", folder / "best.pt", "--to", folder / f"model{kind}", "--clips", 4) == 0
    return folder


def test_the_command_compares_on_the_checkpoints_list(deployed, tmp_path, capsys):
    assert (
        run("--checkpoint", deployed / "best.pt", "--to", tmp_path / "x.pt2", "--clips", 4, "--time", 1)
        == 0
    )
    told = capsys.readouterr().out
    assert "comparing on 4 videos of" in told
    assert "best class the same in 4 of 4 clips" in told
    assert "times as many" in told


def test_a_difference_fails_and_leaves_what_was_there(deployed, tmp_path, capsys, monkeypatch):
    path = tmp_path / "x.pt2"
    path.write_text("older")
    shifted = export.Deployed.forward
    monkeypatch.setattr(export.Deployed, "forward", lambda self, clips: shifted(self, clips) + 2e-4)
    assert run("--checkpoint", deployed / "best.pt", "--to", path, "--clips", 2) == 1
    assert "error: they differ by more" in capsys.readouterr().err
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older"]
    assert run("--checkpoint", deployed / "best.pt", "--to", path, "--clips", 2, "--tolerance", 3e-4) == 0


def test_without_videos_it_says_so_and_compares_on_noise(tmp_path, capsys):
    model, task, config = make("vit_tiny_patch16_224", task="multilabel")
    config.data.val = str(tmp_path / "gone.csv")
    values = {"model": model.state_dict(), "ema": None, "class_names": CLASSES}
    checkpoint.save(tmp_path / "best.pt", values | {"config": to_dict(config), "built": model.built})
    assert run("--checkpoint", tmp_path / "best.pt", "--to", tmp_path / "x.pt2") == 0
    told = capsys.readouterr().out
    assert "16 clips of noise" in told
    assert "gone.csv" in told
    clips = noise(config)
    scores = export.read(tmp_path / "x.pt2", CPU)[2](clips)
    torch.testing.assert_close(scores, task.view_scores(model, clips[None])[0])
    assert (scores.sum(1) - 1).abs().min() > 0.01, "sigmoids"


@pytest.mark.parametrize("kind", export.EXPORT_SUFFIXES)
@pytest.mark.parametrize("views", [{}, {"clips": 1, "crops": 2}])
def test_a_recognizer_of_the_file_is_one_of_the_checkpoint(kind, views, deployed, demo_root):
    video = next(iter(sorted(demo_root.glob("test/*/*.mp4"))))
    original = Recognizer(deployed / "best.pt", device="cpu", **views)
    recognize = Recognizer(deployed / f"model{kind}", device="cpu", timeout=30, **views)
    assert recognize.class_names == CLASSES
    assert recognize.views.clips == original.views.clips
    expected, actual = original(video), recognize(video)
    assert [guess.name for guess in actual] == [guess.name for guess in expected]
    assert [g.score for g in actual] == pytest.approx([g.score for g in expected], abs=1e-5)
    with pytest.raises(InputError, match=r"model\.\w+: an exported file gives scores only"):
        recognize.features(video)
    with pytest.raises(InputError, match="need the checkpoint"):
        recognize.draw_maps(video, "never.png")


@pytest.mark.parametrize("kind", export.EXPORT_SUFFIXES)
def test_a_file_that_is_none_of_ours_is_one_line(kind, tmp_path):
    path = tmp_path / f"junk{kind}"
    with pytest.raises(InputError, match="no such file"):
        Recognizer(path)
    path.write_bytes(b"junk")
    with pytest.raises(InputError, match=r"junk\.\w+: not a readable"):
        Recognizer(path, device="cpu")


def test_absent_onnxruntime_is_one_line(deployed, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"onnxruntime is not installed: pip install stvit_video\[export\]"
    ):
        Recognizer(deployed / "model.onnx", device="cpu")


@pytest.mark.parametrize("precision", ["int8", pytest.param("bf16", marks=pytest.mark.slow)])
def test_lower_precision_is_smaller_and_near(precision, deployed, tmp_path, capsys):
    path = tmp_path / "x.onnx"
    assert run("--checkpoint", deployed / "best.pt", "--to", path, "--precision", precision) == 0
    assert f"({precision}, at most" in capsys.readouterr().out
    assert path.stat().st_size < 0.85 * (deployed / "model.onnx").stat().st_size


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (("--to", "x.pt2", "--precision", "int8"), "of .onnx files only"),
        (("--to", "x.pt2", "--time", "-1"), "--time -1: must be 0 or more"),
        (("--to", "x.bin"), "must end in .onnx or .pt2"),
        (("--to", "x.pt2", "--videos", "nowhere.mp4"), "none of them can be read"),
    ],
)
def test_wrong_flags_are_one_line(flags, cause, deployed, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("--checkpoint", deployed / "best.pt", *flags) == 2
    assert cause in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_threshold_is_refused_in_one_line(tmp_path, capsys):
    model, _, config = make("vit_tiny_patch16_224", superpatches="contrast", superpatch_threshold=0.05)
    values = {"model": model.state_dict(), "ema": None, "class_names": CLASSES}
    checkpoint.save(tmp_path / "best.pt", values | {"config": to_dict(config), "built": model.built})
    assert run("--checkpoint", tmp_path / "best.pt", "--to", tmp_path / "x.onnx") == 2
    assert capsys.readouterr().err == (
        "error: vit_tiny_patch16_224 with model.superpatch_threshold=0.05 cannot be exported: its clips "
        "differ in their number of tokens, those of a file's batch must not; train with a budget, "
        "model.superpatch_tokens\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_the_program_of_the_document_needs_no_toolbox(deployed, demo_root, tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.S)
    assert len([line for line in program.splitlines() if line.strip()]) <= 30
    assert "torch" not in program
    assert "stvit" not in program
    odd = tmp_path / "odd.mp4"  # 94 * (48 / 94) is less than 48
    demo.write_mp4(odd, np.full((20, 94, 126, 3), 99, np.uint8))
    recognize = Recognizer(deployed / "best.pt", device="cpu")
    demo_video = next(iter(sorted(demo_root.glob("test/*/*.mp4"))))
    for video, apart in ((demo_video, 2e-4), (odd, 0.05)):  # resized, its pixels are a level apart
        script = [sys.executable, "-c", program, deployed / "model.onnx", video]
        done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        score, name = done.stdout.split()
        expected = recognize(video)[0]
        assert name == expected.name
        assert float(score) == pytest.approx(expected.score, abs=apart)


def test_the_wheel_carries_recipes_and_commands(tmp_path):
    for name in ("stvit_video", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (scripts,) = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "stvit_video").rglob("*.py")}
    expected |= {f"stvit_video/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    templates = (ROOT / "stvit_video" / "templates").glob("*")
    assert names >= expected | {str(path.relative_to(ROOT)) for path in templates}
    assert not [name for name in names if name.startswith(("tests", "tools"))]
    assert "stvit-export = stvit_video.cli:export" in scripts
