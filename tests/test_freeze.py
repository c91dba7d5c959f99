"""Layers that are not trained, and checkpoints that stay."""

import shutil

import pytest
import torch
from launch import finish, launch
from safetensors.torch import save_file
from test_end_to_end import SMALL, assert_same, figures, run
from test_loop import CPU, NORMALISE, tiny

from stvit_video import cli, create_model
from stvit_video.bench.model import random_batch
from stvit_video.engine import checkpoint
from stvit_video.engine.freeze import freeze, train_mode
from stvit_video.engine.job import Job
from stvit_video.engine.train import LoopConfig, start_run
from stvit_video.errors import InputError
from stvit_video.tasks.classification import Classification

SIZES = {
    "patch_size": (2, 8, 8), "embed_dim": 24, "depth": 4, "num_heads": 2, "base_depth": 1,
    "semantic_tokens": (2, 2, 2), "num_frames": 4, "image_size": 24, "num_classes": 8,
}  # fmt: skip
TOP = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}


def trained_parameters(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_linear_probe_and_the_first_layers():
    model = tiny()
    freeze(model, "backbone")
    assert trained_parameters(model) == TOP
    model = tiny()
    freeze(model, 2)
    frozen = {name for name, _ in model.named_parameters()} - trained_parameters(model)
    assert {name.partition(".attn")[0] for name in frozen if ".attn" in name} == {"blocks.0", "blocks.1"}
    assert "pos_embed" in frozen
    assert "semantic.centres" not in frozen  # joins the third
    with pytest.raises(InputError, match="train.freeze=5: the model has 4 layers"):
        freeze(tiny(), 5)


@pytest.mark.parametrize("what", ["backbone", 2])
def test_what_no_pixel_passes_through_stays_frozen(what):
    """A parameter without a gradient among those that learn stops a run on several processes."""
    sizes = {k: v for k, v in SIZES.items() if k not in ("base_depth", "semantic_tokens")}
    model = create_model("vit_tiny_patch16_224", **sizes, head="linear")
    freeze(model, what)
    model.loss(model(torch.randn(1, 3, 4, 24, 24)), torch.zeros(1, 4, 24, 24))["loss"].backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained_parameters(model)
    assert "backbone.fc_norm.weight" not in trained_parameters(model)
    assert "head.linear.weight" in trained_parameters(model)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("layer_decay", [None, 0.8])
def test_what_is_frozen_stays_and_the_optimiser_knows_nothing_of_it(layer_decay, parallel):
    task = Classification("abc", normalise=NORMALISE)
    config = LoopConfig(
        freeze=2, layer_decay=layer_decay, ema=0.5, ema_warmup=False, lr=1.0, parallel=parallel
    )
    model = tiny(drop_path=0.5).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    kept = start_run(Job(task, model, CPU, None, None, {}), config, updates_an_epoch=9, scale=0.1)
    held = {id(p) for group in kept.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    train_mode(kept.model)
    for _ in range(3):
        kept.make_update(task, iter([random_batch(2, 2, 32)]), 1, seed=0)
    averages = dict(kept.ema.module.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        assert torch.equal(averages[name], before[name]) != parameter.requires_grad, name


def test_what_is_frozen_computes_as_in_scoring():
    """Batch statistics of STViT-R's stem, and drop path."""
    sizes = {"depths": [2, 2, 6, 2], "num_heads": [1, 2, 2, 4], "embed_dim": 8, "drop_path": 0.5}
    model = create_model("stvit_r_swin_small", num_classes=3, image_size=64, num_frames=1, **sizes)
    image = torch.randn(2, 3, 64, 64)
    freeze(model, 4)
    train_mode(model)
    before = model.patch_embed.norm1.running_mean.clone()
    first, again = (model.grids(image, (1, 2))[1] for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(model.patch_embed.norm1.running_mean, before)
    assert not model.layers[1].training
    assert model.layers[2].blocks[0].training
    assert model.training
    freeze(model, "backbone")
    train_mode(model)
    assert {name for name, m in model.named_modules() if m.training} == {"", "dropout", "norm", "head"}


@pytest.fixture(scope="module")
def args(tmp_path_factory, demo_root):
    folder = tmp_path_factory.mktemp("frozen")
    (folder / "small.yaml").write_text(SMALL)
    save_file(create_model("stvit_tiny_patch16_224", **SIZES).state_dict(), folder / "from.safetensors")
    return [
        *("--cfg", f"{folder}/small.yaml", f"--data.train={demo_root}/train"),
        *(f"--model.weights={folder}/from.safetensors", "--train.freeze=2", "--train.keep_every=1"),
    ]


@pytest.fixture(scope="module")
def frozen(args, tmp_path_factory):
    output = tmp_path_factory.mktemp("frozen") / "run"
    assert run(cli.train, *args, f"--output={output}") == 0
    return output


def test_a_run_goes_on_from_a_checkpoint_that_was_kept(frozen, args, tmp_path, capsys):
    assert {path.name for path in frozen.glob("epoch-*")} == {"epoch-0001.pt", "epoch-0002.pt"}
    assert checkpoint.load(frozen / "epoch-0001.pt")["epoch"] == 1
    shutil.copytree(frozen, tmp_path / "run")
    shutil.copy(frozen / "epoch-0001.pt", tmp_path / "run" / "last.pt")
    assert run(cli.train, *args, f"--output={tmp_path}/run", "--resume") == 0
    states = [checkpoint.load(folder / "last.pt") for folder in (frozen, tmp_path / "run")]
    for state in states:
        del state["config"]
    assert_same(*states)
    assert "train.freeze=2: 14,888 of 39,008 parameters are trained" in capsys.readouterr().out
    assert run(cli.train, *args, f"--output={tmp_path}/run", "--resume", "--train.freeze=1") == 2
    assert "began with train.freeze=2" in capsys.readouterr().err
    assert run(cli.train, *args, f"--output={tmp_path}/run", "--overwrite", "--train.keep_every=2") == 0
    assert {path.name for path in (tmp_path / "run").glob("epoch-*")} == {"epoch-0002.pt"}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_freeze_alike(frozen, args, tmp_path, kind):
    given = [*args, f"--output={tmp_path}/run", "--train.batch_size=2", f"--train.parallel={kind}"]
    given += ["--model.drop_path=0", "--train.mixup=0", "--train.cutmix=0", "--train.erasing=0"]
    log = tmp_path / "log.txt"
    assert finish(launch(cli.train, *given, ranks=2, log=log)) == [0, 0], log.read_text()
    before, after = (
        checkpoint.load(frozen / "epoch-0001.pt"),
        checkpoint.load(tmp_path / "run" / "last.pt"),
    )
    same = {name for name, t in after["model"].items() if torch.equal(t, before["model"][name])}
    assert {name.split(".")[1] for name in same if name.startswith("blocks.")} == {"0", "1"}
    assert figures(tmp_path / "run")[-1]["loss"] < 10


def test_to_freeze_what_was_not_trained_is_refused(args, tmp_path, capsys):
    assert run(cli.train, *args, f"--output={tmp_path}/run", "--model.weights=null") == 2
    assert "train.freeze=2: without model.weights chance would be frozen" in capsys.readouterr().err
