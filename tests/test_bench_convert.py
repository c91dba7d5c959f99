"""stvit-bench convert: each row is what that model makes of the pictures, beside the dense one's."""

import csv

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from test_end_to_end import run

from stvit_video import cli, create_model, load_weights, multiply_adds

SIDE, CLASSES, NAME = 64, 6, "stvit_tiny_patch16_224"  # 4x4 patches
SIZES = {"num_classes": CLASSES, "num_frames": 1, "image_size": SIDE, "pos_embed": "learned"}


@pytest.fixture(scope="module")
def state():
    """A ViT of timm's whose classes depend on the picture."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, img_size=SIDE, class_token=False,
                              global_pool="avg")  # fmt: skip
    torch.nn.init.normal_(model.head.weight, std=2.0)
    return model.state_dict()


@pytest.fixture
def convert(tmp_path, state, capsys):
    """convert(flag, ...) -> (exit code, rows of the csv, what it says to stderr), on seven pictures."""
    draw = np.random.default_rng(0)
    for i in range(7):
        colours = draw.integers(0, 255, (4, 4, 3), np.uint8).repeat(16, 0).repeat(16, 1)
        Image.fromarray(colours).save(tmp_path / f"{i}.png")
    (tmp_path / "list.txt").write_text("".join(f"{tmp_path}/{i}.png\n" for i in range(7)))
    save_file(state, tmp_path / "vit.safetensors")
    fixed = [f"--data.test={tmp_path}/list.txt", f"--model.weights={tmp_path}/vit.safetensors"]
    fixed += ["--data.num_frames=1", f"--data.image_size={SIDE}", "--data.sampling=middle", "--device=cpu"]
    fixed += ["--data.workers=0", "--model.name=auto", f"--output={tmp_path}/out"]

    def convert(*flags):
        code = run(cli.bench, "convert", *fixed, *flags)
        table = tmp_path / "out" / "convert.csv"
        rows = list(csv.DictReader(table.open())) if table.exists() else []
        return code, rows, capsys.readouterr().err

    return convert


def scores(folder, state, indices, **sizes):
    """What a model makes of some of the pictures -> (N, classes) of probabilities, its multiply-adds."""
    model = create_model(NAME, **SIZES, **sizes).eval()
    load_weights(model, state, fresh=())
    pixels = torch.stack([
        torch.from_numpy(np.array(Image.open(folder / f"{i}.png"))).permute(2, 0, 1) for i in indices
    ])  # fmt: skip
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        logits = model(((pixels / 255 - mean) / std)[:, :, None])
    return logits.softmax(-1), multiply_adds(model, num_frames=1, image_size=SIDE)


def test_rows_are_what_each_model_makes_of_the_pictures(convert, tmp_path, state):
    code, rows, _ = convert("--base-depths=2,6", "--tokens=2x2", "--starts=grid,max", "--limit=4")
    assert code == 0
    assert rows[0]["start"] == "dense"
    assert (float(rows[0]["kept"]), float(rows[0]["cost"])) == (1, 1)
    starts = {"grid": {"pool": "grid", "semantic_proportional": True}, "max": {"pool": "max"}}
    variants = {(r["start"], r["base depth"], r["tokens"]): r for r in rows if r["base depth"]}
    assert len(variants) == 2 * 2
    spread = [0, 1, 3, 5]  # 4 of 7, evenly
    dense, whole = scores(tmp_path, state, spread, semantic_tokens=None)
    best = dense.argmax(-1, keepdim=True)
    assert len(best.unique()) > 1
    assert float(rows[0]["probability"]) == pytest.approx(dense.amax(-1).mean().item(), abs=1e-5)
    for (start, depth, tokens), row in variants.items():
        sizes = {"semantic_tokens": tuple(map(int, tokens.split("x"))), "base_depth": int(depth)}
        these, cost = scores(tmp_path, state, spread, **sizes, **starts[start], centres=False)
        assert float(row["cost"]) == round(cost / whole, 4)
        assert float(row["kept"]) == (these.argmax(-1, keepdim=True) == best).double().mean().item()
        assert float(row["probability"]) == pytest.approx(these.gather(-1, best).mean().item(), abs=1e-5)
    assert min(float(row["kept"]) for row in variants.values()) < 1
    with Image.open(tmp_path / "out" / "convert.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_a_token_for_each_patch_changes_nothing(convert):
    """Each is pooled over one patch, and the layers after it are the dense model's."""
    code, rows, _ = convert("--base-depths=3", "--tokens=4x4,2x2", "--starts=pool")
    assert code == 0
    dense, same = rows[0], next(row for row in rows if row["tokens"] == "1x4x4")
    fewer = next(row for row in rows if row["tokens"] == "1x2x2")
    assert {same[key] for key in ("cost", "kept")} == {"1.0"}
    assert float(same["probability"]) == pytest.approx(float(dense["probability"]), abs=1e-6)
    assert abs(float(fewer["probability"]) - float(dense["probability"])) > 1e-3
    assert float(fewer["cost"]) < 0.6


def test_what_cannot_be_compared_is_one_line(convert, tmp_path, state):
    save_file({k: v for k, v in state.items() if not k.startswith("head.")}, tmp_path / "bare.safetensors")
    code, rows, error = convert(f"--model.weights={tmp_path}/bare.safetensors")
    assert (code, rows) == (2, [])
    assert error.startswith(f"error: model.weights={tmp_path}/bare.safetensors: has no classifier")
    assert error.count("\n") == 1
    (tmp_path / "2.png").write_text("no picture")
    code, rows, error = convert("--base-depths=3", "--tokens=2x2", "--starts=pool")
    assert (code, rows) == (2, [])
    line = error.splitlines()[-1]
    assert line.startswith(f"error: {tmp_path}/2.png: ")
    assert line.endswith(": to compare models, all must be readable")
