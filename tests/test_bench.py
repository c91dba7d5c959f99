"""Benchmarks: what they measure is what they say. No timing is asserted but what follows from the work."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from stvit_video import cli, create_model, multiply_adds
from stvit_video.bench import model as bench
from stvit_video.bench import report
from stvit_video.bench.accuracy import variant
from stvit_video.bench.commands import _names
from stvit_video.config import Config, ConfigError, ModelConfig
from stvit_video.errors import InputError

CPU = torch.device("cpu")
CLIP = {"num_frames": 2, "image_size": 32}


class Products(nn.Module):
    """`times` products with one matrix: the same parameters, so many times the work."""

    def __init__(self, times):
        super().__init__()
        self.times, self.linear, self.head = times, nn.Linear(768, 768), nn.Linear(768, 3)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2).flatten(1)[:, :768].repeat(32, 1)
        for _ in range(self.times):
            x = self.linear(x)
        return self.head(x[: len(x) // 32])


def test_twice_the_work_takes_about_twice_the_time():
    models = {"one": Products(8), "three": Products(24)}
    rows = bench.measure_models(models, **CLIP, batches=[1, 2], rounds=3, device=CPU)
    assert [(r["model"], r["mode"], r["batch"]) for r in rows] == [
        (name, mode, batch) for mode in ("forward", "training") for batch in (1, 2) for name in models
    ]
    for row in rows:
        assert row["low"] <= row["clips/s"] <= row["high"] or row["batch"] == 1
        assert row["clips/s"] == pytest.approx(1000 * row["batch"] / row["ms"])
        assert row["ms"] <= row["ms p95"]
        cost = multiply_adds(models[row["model"]], **CLIP)
        assert row["G multiply-adds"] == cost / 1e9
        passes = {"forward": 1, "training": 3}[row["mode"]]
        assert row["TFLOP/s"] == pytest.approx(2 * passes * cost * row["clips/s"] / 1e12)
        if row["model"] == "one":
            assert row["ratio"] == 1
        else:
            assert 0.15 < row["ratio"] < 0.7


def test_a_training_step_trains():
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", num_classes=3, depth=1, embed_dim=48, **CLIP)
    before = model.head.weight.detach().clone()
    bench._call(model, torch.randn(1, 3, 2, 32, 32), "training", torch.float32, None, CPU)()
    assert not torch.equal(model.head.weight, before)
    assert model.training
    assert model.head.weight.grad is None
    bench._call(model, torch.randn(1, 3, 2, 32, 32), "forward", torch.bfloat16, None, CPU)()
    assert model.head.weight.dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_memory_is_that_of_the_tensors_it_takes():
    """Weights, gradients and two moments of a wide head: four times its size, and AdamW's workspace."""
    sizes = {"num_classes": 200_000, "depth": 1, "embed_dim": 96, "num_heads": 3}  # a head of 73 MiB
    found = bench.measure_memory(
        "vit_tiny_patch16_224", sizes, **CLIP, batch=1, mode="training", device=CPU
    )
    assert 4 * 73 < found < 8 * 73


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_bfloat16_takes_less_than_float32():
    sizes = {"num_classes": 200_000, "depth": 1, "embed_dim": 96, "num_heads": 3}
    case = CLIP | {"batch": 1, "mode": "forward", "device": CPU}
    found = [
        bench.measure_memory("vit_tiny_patch16_224", sizes, **case, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert 73 < found[0] < 73 + 60
    assert found[1] < found[0] - 20


def test_the_command(tmp_path, capsys):
    fewer = "stvit_tiny_patch16_224:base_depth=2:semantic_tokens=[2,2,2]"
    cli.bench(["model", "--models", f"vit_tiny_patch16_224,{fewer}", "--batch", "1",
               "--modes", "forward", "--image-size", "64x96", "--rounds", "1",
               "--no-memory", "--output", str(tmp_path)])  # fmt: skip
    printed = capsys.readouterr().out
    assert "cores" in printed
    with open(tmp_path / "model.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["vit_tiny_patch16_224", fewer]
    sizes = {"num_frames": 16, "image_size": (64, 96)}
    model = create_model(
        "stvit_tiny_patch16_224", base_depth=2, semantic_tokens=(2, 2, 2), num_classes=400, **sizes
    )
    assert float(rows[1]["G multiply-adds"]) == pytest.approx(multiply_adds(model, **sizes) / 1e9, rel=1e-3)
    assert float(rows[0]["ratio"]) == 1
    assert (tmp_path / "model.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["modle"], ("modle", "model")),
        (["model", "--models", "vit_tny_patch16_224"], ("vit_tny_patch16_224", "vit_tiny_patch16_224")),
        (["model", "--models", "vit_tiny_patch16_224:dept=3"], ("dept", "depth")),
        (["model", "--models", "vit_tiny_patch16_224:num_frames=3"], ("num_frames",)),
        (["model", "--models", "vit_tiny_patch16_224:depth=]"], ("depth=]",)),
        (["model", "--models", "vit_tiny_patch16_224", "--modes", "backward"], ("backward", "training")),
        (["model", "--models", "vit_tiny_patch16_224", "--batch", "1,x"], ("1,x",)),
        (["model", "--models", "vit_tiny_patch16_224", "--rounds", "0"], ("--rounds",)),
        (["model", "--models", "vit_tiny_patch16_224", "--num-frames", "3"], ("3 frames",)),
        (["model", "--models", ","], ("--models",)),
        (["model", "--models", "vit_tiny_patch16_224", "--image-size", "8x8x8"], ("800x1216",)),
        (["data", "--videos", "absent.mp4"], ("absent.mp4", "no such file")),
        (["data", "--videos", "README.md"], ("README.md",)),
        (["data", "--rounds", "0"], ("--rounds",)),
        (["data", "--workers", ""], ("--workers",)),
        (["data", "--workers=-1"], ("--workers", "-1")),
        (["accuracy", "--models", "dense,tome"], ("tome", "how many tokens, TxHxW")),
        (["accuracy", "--seeds=-1"], ("--seeds", "-1")),
        (["accuracy", "--rounds", "0"], ("--rounds",)),
    ],
)
def test_what_makes_no_sense_is_one_line(tmp_path, capsys, demo_root, args, parts):
    more = ["--data.train", str(demo_root / "train"), "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as exit:
        cli.bench([*args, *(more if args[0] == "accuracy" else [])])
    assert exit.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    for part in parts:
        assert part in error


def test_names_are_split_outside_brackets():
    names = "a,b:shapes=[[8,1,1],[4,1,1]]:x=3,c:d=[1,2],e"
    assert _names()(names) == ["a", "b:shapes=[[8,1,1],[4,1,1]]:x=3", "c:d=[1,2]", "e"]


def test_variants():
    config = Config(model=ModelConfig(name="stvit_tiny_patch16_224", base_depth=2))
    assert variant(config, "dense").model.semantic_tokens is None
    own = variant(config, "tome:4x2x2").model
    assert (own.reducer, own.semantic_tokens, own.base_depth) == ("tome", (4, 2, 2), 2)
    own = variant(config, "semantic:4x2x2:base_depth=3:train.layer_decay=0.5")
    assert (own.model.base_depth, own.train.layer_decay) == (3, 0.5)
    merging = replace(config, model=replace(config.model, pool="merge"))
    assert [variant(merging, f"{name}:4x2x2").model.pool for name in ("semantic", "pool")] == [
        "merge",
        "avg",
    ]
    own = variant(config, "tome:tome_r=7").model
    assert (own.reducer, own.semantic_tokens, own.tome_r) == ("tome", None, 7)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("best:4x2x2", "best"),
        ("semantic", "how many tokens"),
        ("semantic:4x2", "'4x2' is neither"),
        ("dense:4x2x2", "'4x2x2' is neither"),
        ("semantic:4x2x2:base_dept=3", "did you mean 'model.base_depth'"),
        ("dense:data.stride=3", "model and train alone"),
        ("semantic:4x2xx2", "'4x2xx2' is neither"),
        ("semantic:4x2x2:pool=[1", "pool=[1"),
        ("semantic:99x2x2", "between 1 and the number"),
    ],
)
def test_variants_that_make_no_sense(name, part):
    config = Config(model=ModelConfig(name="stvit_tiny_patch16_224"))
    with pytest.raises(ConfigError, match=re.escape(part)):
        variant(config, name)


def test_accuracy_against_speed(tmp_path, demo_root, capsys, monkeypatch):
    args = ["accuracy", "--cfg", "configs/demo_stvit.yaml", "--data.train", str(demo_root / "train"),
            "--data.val", str(demo_root / "test"), "--model.embed_dim", "24", "--model.depth", "4",
            "--model.base_depth", "1", "--train.epochs", "1", "--models", "dense,pool:2x2x2",
            "--seeds", "0,1", "--rounds", "1", "--output", str(tmp_path), "--data.preset", "custom",
            "--eval.clips", "1", "--eval.crops", "1"]  # fmt: skip
    cli.bench(args)
    with open(tmp_path / "accuracy.csv", newline="") as file:
        first = list(csv.DictReader(file))
    assert [row["model"] for row in first] == ["dense", "pool:2x2x2"]
    assert [row["low"] for row in report.read(tmp_path / "accuracy.csv", ["low"])] == [
        float(row["low"]) for row in first
    ]
    (tmp_path / "odd.csv").write_text("model,low\ndense,\n")
    with pytest.raises(InputError, match="odd.csv, line 2: low is '', no number"):
        report.read(tmp_path / "odd.csv", ["model", "low"])
    with pytest.raises(InputError, match="no table with the columns model, speed"):
        report.read(tmp_path / "accuracy.csv", ["model", "speed"])
    with pytest.raises(InputError, match="none.csv: cannot be read"):
        report.read(tmp_path / "none.csv", ["model"])
    assert float(first[1]["G multiply-adds"]) < float(first[0]["G multiply-adds"])
    for row in first:
        assert 0 <= float(row["low"]) <= float(row["top-1"]) <= float(row["high"]) <= 100
    logs = sorted(tmp_path.glob("*/log.jsonl"))
    assert len(logs) == 4
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    before = [log.stat().st_mtime_ns for log in logs]
    # runs that have ended are not trained again; another run's table is drawn beside this one's
    other = tmp_path / "other" / "accuracy.csv"
    other.parent.mkdir()
    other.write_text((tmp_path / "accuracy.csv").read_text())
    titles = []
    monkeypatch.setattr("stvit_video.bench.accuracy.draw_trade", lambda tables, _: titles.extend(tables))
    cli.bench([*args, "--beside", str(other)])
    assert titles == ["other", tmp_path.name]
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        cli.bench([*args, "--beside", str(tmp_path / "accuracy.csv")])
    assert f"another is called {tmp_path.name}" in capsys.readouterr().err
    assert [log.stat().st_mtime_ns for log in logs] == before
    cli.bench([*args, "--data.stride", "1"])  # but others are
    assert all(log.stat().st_mtime_ns > time for log, time in zip(logs, before, strict=True))
