"""How many tokens a clip has with superpatches by threshold: in models, figures and logs, on any ranks."""

import json
import re

import pytest
import torch
from launch import finish, launch
from test_end_to_end import SMALL, figures, run, settings
from test_superpatches import vit
from test_tasks import NORMALISE

from stvit_video import cli
from stvit_video.data.batch import Batch
from stvit_video.data.rows import Row
from stvit_video.engine.evaluate import write_report
from stvit_video.engine.job import Outcome
from stvit_video.engine.train import Trainer
from stvit_video.models.superpatches import Superpatches
from stvit_video.tasks.classification import Classification
from stvit_video.tasks.multilabel import MultiLabel

FEWEST, PATCHES = 4, 32  # of a clip of 2x4x4 patches: groups of 2x2x2
CHUNKS = {"name": "stvit_tiny_patch16_224", "semantic_tokens": (2, 2, 2), "base_depth": 1, "base_window": 1}


def even_and_noise():
    """uint8 (2, 2, 3, 4, 32, 32): a video of an even view and of noise, and one of noise alone."""
    clips = torch.randint(256, (2, 2, 3, 4, 32, 32), dtype=torch.uint8)
    clips[0, 0] = 90
    return clips


def test_an_even_clip_has_the_fewest_tokens_and_noise_all():
    model, clips = vit(superpatches="contrast"), NORMALISE(even_and_noise()[0])
    assert model.clip_tokens is None  # before any clip
    for clip, expected in zip(clips, (FEWEST, PATCHES), strict=True):
        model(clip[None])
        assert model.clip_tokens.tolist() == [expected]
    model(clips)
    assert model.clip_tokens.tolist() == [FEWEST, PATCHES]


def test_tokens_of_a_clip_are_those_of_all_its_chunks():
    model, clips = vit(superpatches="contrast", **CHUNKS), NORMALISE(even_and_noise()[0])
    clips[1, :, :2] = 0  # its first chunk is even
    model(clips)
    assert model.clip_tokens.tolist() == [2, 1 + 16]  # a chunk's largest group: 1x4x4


def test_where_all_clips_have_as_many_nothing_is_said():
    batch = Batch(torch.arange(2), even_and_noise(), None, previews=[None] * 2)
    task = Classification("ab", normalise=NORMALISE)
    for sizes in ({}, {"superpatches": "contrast", "superpatch_tokens": 9}):
        model = vit(**sizes)
        records = task.records(model, batch)
        assert model.clip_tokens is None
        assert "tokens" not in task.figures(Outcome([Row("a", 0), Row("b", 1)], records, {}))


@pytest.mark.parametrize("view_batch", [1, 3])
@pytest.mark.parametrize(("kind", "targets"), [(Classification, (0, 1)), (MultiLabel, ((0,), (0, 1)))])
def test_each_view_is_counted(tmp_path, kind, targets, view_batch):
    task = kind("abc", normalise=NORMALISE, view_batch=view_batch)
    batch = Batch(torch.arange(2), even_and_noise(), None, previews=[None] * 2)
    model = vit(superpatches="contrast", num_classes=3)
    records = [*task.records(model, batch), None]  # the last could not be read
    rows = [Row(f"{i}.mp4", target) for i, target in enumerate((*targets, targets[0]))]
    outcome = Outcome(rows, records, {2: "gone"}, [])
    lines = write_report(
        tmp_path, task, outcome, views={"clips": 2, "crops": 1}, details={"on_failure": "wrong"}
    )
    counts = {"patches": PATCHES, "views": 4, "mean": 25.0, "least": FEWEST, "most": PATCHES}
    assert json.loads((tmp_path / "report.json").read_text())["tokens"] == counts
    assert "  tokens a view            25.0 of 32 patches (4 to 32)" in lines


# ---- runs

MERGED = ["--model.superpatches=contrast", "--model.superpatch_threshold=0.02", "--train.epochs=1"]
KEYS = ("tokens", "tokens_least", "tokens_most")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, demo_root):
    """A run of one process, its arguments, and how many tokens each clip had on its way."""
    folder, counts = tmp_path_factory.mktemp("alone"), []
    same = re.sub(r"(erasing|mixup|cutmix): [\d.]+", r"\1: 0", SMALL)  # nothing is drawn by rank
    args = [*settings(folder, demo_root, same), *MERGED]
    forward = Superpatches.forward

    def watched(self, *given):
        tokens = forward(self, *given)
        if self.training and not tokens.x.is_meta:
            counts.extend(tokens.count().tolist())
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Superpatches, "forward", watched)
        assert run(cli.train, *args, f"--output={folder}/run") == 0
    return folder / "run", args, counts


def logged(folder):
    (epoch,) = (entry for entry in figures(folder) if entry["kind"] == "epoch")
    return [epoch[key] for key in KEYS]


def test_an_epoch_logs_the_tokens_of_all_its_clips(alone):
    folder, _, counts = alone
    assert len(counts) == 48  # 24 videos, two clips each
    assert logged(folder) == [sum(counts) / 48, min(counts), max(counts)]
    assert min(counts) < max(counts)


def test_two_ranks_log_what_one_does_though_they_were_stopped(alone, tmp_path):
    folder, args, _ = alone

    def stop(rank):
        flags = Trainer._flags
        Trainer._flags = lambda self: (0.0, self.run.update == 1, *flags(self)[2:])

    log = tmp_path / "out.txt"
    given = [*args, "--train.batch_size=2", f"--output={tmp_path}/run", "--resume"]
    for code, before in ((143, stop), (0, None)):
        started = launch(cli.train, *given, ranks=2, log=log, before=before)
        assert finish(started) == [code] * 2, log.read_text()
    assert "SIGTERM: stopped after update 2" in log.read_text()
    mean, least, most = logged(tmp_path / "run")
    assert [mean, least, most] == logged(folder)
    assert re.search(
        rf"epoch 1: loss [\d.]+, {mean:.1f} tokens a clip \({least} to {most}\),", log.read_text()
    )


def test_two_ranks_report_what_one_does(alone, tmp_path, capsys):
    folder, args, _ = alone
    given = [*args, f"--checkpoint={folder}/last.pt", "--eval.crops=1", "--eval.previews=false"]
    assert run(cli.test, *given, f"--output={tmp_path}/one") == 0
    said, log = capsys.readouterr().out, tmp_path / "out.txt"
    assert finish(launch(cli.test, *given, f"--output={tmp_path}/two", ranks=2, log=log)) == [0, 0]
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert one["tokens"] == two["tokens"]
    assert one["tokens"]["views"] == 11 * 2
    assert (
        one["tokens"]["least"] < one["tokens"]["mean"] < one["tokens"]["most"] <= one["tokens"]["patches"]
    )
    line = "tokens a view            {mean:.1f} of 18 patches ({least} to {most})".format(**one["tokens"])
    assert line in said
    assert line in log.read_text()
