"""The policy of superpatches without labels: a dense model's patches say what can be merged."""

import json
import re

import numpy as np
import pytest
import torch
from test_end_to_end import SMALL, figures, run
from test_models import CLIP, TINY
from test_superpatches import NET, half_even, vit

from stvit_video import cli, create_model
from stvit_video.data.batch import Batch
from stvit_video.data.transforms import Normalise
from stvit_video.engine import checkpoint
from stvit_video.models.superpatches import agreement_targets, policy_loss
from stvit_video.predictor import Predictor
from stvit_video.recognizer import load_model
from stvit_video.tasks.agreement import Agreement

DCTS = {"superpatches": "dcts", "superpatch_policy": NET}
STVIT = {"name": "stvit_tiny_patch16_224", "semantic_tokens": (2, 2, 2), "base_depth": 2}


def trainer(**sizes):
    torch.manual_seed(0)
    return create_model(**{**CLIP, **TINY, **STVIT, **DCTS, "head": "policy", **sizes})


def test_targets_are_where_the_teachers_patches_agree():
    """After the last layer on all patches, of every clip; of a model with chunks, in each of them."""
    teacher, clips = vit(), half_even(2)
    expected = agreement_targets(teacher.grids(clips, [2])[0], trainer().shapes, threshold=0.8)
    targets = trainer().agreement(teacher, clips, 0.8)
    assert all(map(torch.equal, targets, expected))
    shares = [target.float().mean().item() for target in targets]
    assert 0 < shares[0] < 1
    chunked = trainer(base_window=1, semantic_tokens=(2, 2, 2))
    assert chunked.shapes == [(1, 4, 4), (1, 2, 2)]
    logits, targets = chunked(clips), chunked.agreement(teacher, clips, 0.8)
    grid = teacher.grids(clips, [2])[0].flatten(0, 1)[:, None]
    assert all(map(torch.equal, targets, agreement_targets(grid, chunked.shapes, threshold=0.8)))
    assert [x[:, 0].shape for x in logits] == [x.shape for x in targets]
    policy = chunked.superpatches.policy.eval()
    alone = policy(clips[1:, :, 2:])  # the second clip's second chunk
    assert all(torch.allclose(x[3:], y, atol=1e-5) for x, y in zip(chunked(clips), alone, strict=True))


def test_the_loss_is_the_policys_and_falls():
    normalise = Normalise((0.5,) * 3, (0.5,) * 3)
    task, model = Agreement(["0"], normalise=normalise), trainer().train()
    task.teacher = vit()
    clips = (127 + 60 * half_even(4)).clamp(0, 255).to(torch.uint8)[:, None]
    batch, pixels = Batch(torch.arange(4), clips, None), normalise(clips[:, 0])
    task.settings.agreement = 0.8
    targets = model.agreement(task.teacher, pixels, 0.8)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(12):
        losses.append(task.loss(model, batch)["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    first = policy_loss(trainer().train()(pixels), targets).item()
    assert losses[0].item() == pytest.approx(first, abs=1e-5)
    assert losses[-1] < 0.5 * losses[0].item()
    assert all(p.grad is None for p in task.teacher.parameters())


# ---- runs

MODEL = ["--model.superpatches=dcts", f"--model.superpatch_policy={NET}"]
PLAIN = ["--train.epochs=1", "--train.ema=null", "--train.layer_decay=null", "--eval.crops=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, demo_root):
    """A dense model trained with labels; and from it, without any, a policy."""
    folder = tmp_path_factory.mktemp("agreement")
    (folder / "small.yaml").write_text(SMALL)
    for split in ("train", "test"):
        lines = [f"{path}\n" for path in sorted(demo_root.glob(f"{split}/*/*.mp4"))]
        (folder / f"{split}.txt").write_text("".join(lines))
    labelled = ["--cfg", f"{folder}/small.yaml", f"--data.train={demo_root}/train", *PLAIN]
    dense = ["--model.name=vit_tiny_patch16_224", "--model.base_depth=auto", "--model.semantic_tokens=auto"]
    assert run(cli.train, *labelled, *dense, f"--output={folder}/dense") == 0
    args = ["--cfg", f"{folder}/small.yaml", *PLAIN, *MODEL, "--task=policy", "--data.flip=all"]
    args += [f"--data.train={folder}/train.txt", f"--data.val={folder}/test.txt"]
    taught = [f"--train.teacher={folder}/dense/last.pt", "--train.agreement=0.5", "--train.epochs=2"]
    assert run(cli.train, *args, *taught, f"--output={folder}/policy") == 0
    return folder, labelled, args


def test_a_run_without_labels_makes_a_policy_that_a_classifier_takes(runs, tmp_path):
    folder, labelled, _ = runs
    epochs = [entry for entry in figures(folder / "policy") if entry["kind"] == "epoch"]
    assert epochs[1]["loss"] < epochs[0]["loss"]
    assert 0 <= epochs[1]["val_f1"] <= 1
    given = [*labelled, *MODEL, f"--model.policy={folder}/policy/last.pt", "--model.superpatch_tokens=9"]
    assert run(cli.train, *given, f"--output={tmp_path}/run") == 0
    ours = checkpoint.load(tmp_path / "run" / "last.pt")["model"]
    theirs = load_model(folder / "policy" / "last.pt")[2].superpatches.policy.state_dict()
    assert theirs
    for name, tensor in theirs.items():
        assert torch.equal(ours[f"superpatches.policy.{name}"], tensor), name


def test_a_policy_without_labels_is_scored_by_its_teacher(runs, tmp_path, capsys):
    folder, _, _ = runs
    given = [f"--checkpoint={folder}/policy/last.pt", f"--data.val={folder}/test.txt", "--device=cpu"]
    given += ["--data.workers=0", "--eval.clips=2", "--eval.crops=1"]
    assert run(cli.test, *given, f"--output={tmp_path}") == 0
    assert "a view of 4x24x24, no labels\n" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert next(iter(report["groups"])) == "2x2x2"
    assert report["tokens"]["patches"] == 18
    assert report["tokens"]["windows"] == 22
    assert all(0 <= group["share"] <= 1 for group in report["groups"].values())


def test_images_without_labels(runs, tmp_path, demo_root, capsys):
    """Also drawn, by a model that needs no teacher any more."""
    _, labelled, args = runs
    image = ["--data.num_frames=1", "--model.patch_size=[1,8,8]", "--model.semantic_tokens=[1,2,2]"]
    teacher = tmp_path / "stvit"  # its layer before the semantic ones
    assert run(cli.train, *labelled, *image, f"--output={teacher}") == 0
    given = [*args, *image, f"--train.teacher={teacher}/last.pt", f"--output={tmp_path}/policy"]
    capsys.readouterr()
    assert run(cli.train, *given) == 0
    assert re.search(
        r"a view of 1x24x24, no labels\ntraining on 24 videos: 1 epochs", capsys.readouterr().out
    )
    teacher.rename(tmp_path / "gone")
    predict = Predictor(tmp_path / "policy" / "last.pt", device="cpu")
    record = predict(np.full((40, 24, 3), 100, np.uint8))
    assert predict.task.plain(record)["patches"] == 18  # two windows
    assert predict.task.draw(np.zeros((40, 24, 3), np.uint8), record).shape == (400, 240, 3)


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ([], r"has no mask, which patches .*; without masks, train.teacher says which agree"),
        (["--train.teacher=dense", "--model.patch_size=[2,12,12]"], r"train.teacher=\S+: its grid "
         r"of patches is \(2, 3, 3\), not \(2, 2, 2\) \(model.patch_size\)"),
        (["--train.teacher=dense", "--model.base_depth=5", "--model.depth=7"],
         r"train.teacher=\S+: it has 4 layers on all patches, less than 5"),
        (["--train.teacher=dense", "--data.num_frames=6"], "was trained with data.num_frames=4, not 6"),
        (["--train.teacher=dense", "--data.mean=[0.5,0.5,0.5]"], "was trained with data.mean="),
        (["--train.teacher=policy"], "its model is a PolicyTrainer; a ViT's patches agree or not"),
    ],
)  # fmt: skip
def test_what_cannot_teach(runs, tmp_path, capsys, flags, rule):
    folder, _, args = runs
    flags = [re.sub(r"teacher=(\w+)", rf"teacher={folder}/\1/last.pt", flag) for flag in flags]
    assert run(cli.train, *args, *flags, f"--output={tmp_path}/run") == 2
    error = capsys.readouterr().err
    assert re.search(rule, error), error
    assert len(error.strip().splitlines()) == 1


def test_a_model_that_merges_patches_cannot_say_whether_they_agree():
    with pytest.raises(ValueError, match="merges patches itself"):
        trainer().check_teacher(vit(superpatches="contrast"))
    trainer().check_teacher(vit())
    trainer().check_teacher(vit(**STVIT))
