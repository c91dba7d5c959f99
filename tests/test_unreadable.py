"""Unreadable files: stood in for, counted and listed in training; never swapped in scoring."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_end_to_end import TRAIN_NET, run, settings

from stvit_video import cli
from stvit_video.engine.evaluate import Shares
from stvit_video.tasks.classification import Classification, Scores

PLAIN = ("--data.flip=none", "--data.repeats=1", "--train.epochs=1", "--train.accumulate=1")


@pytest.fixture
def lists(tmp_path, demo_root):
    """lists(bad, ...): settings for a list of `bad` pipes, then the 24 readable training clips."""
    clips = sorted(demo_root.glob("train/*/*.mp4"))

    def make(bad, clips=clips):
        pipes = [tmp_path / f"pipe{i}.mp4" for i in range(bad)]
        for pipe in pipes:
            os.mkfifo(pipe)
        lines = [f"{path} {i % 8}" for i, path in enumerate([*pipes, *clips])]
        (tmp_path / "list.txt").write_text("\n".join(lines))
        args = settings(tmp_path, demo_root)
        return [*args[:2], f"--data.train={tmp_path}/list.txt", *PLAIN, f"--output={tmp_path}/run"]

    return make


def epochs(folder):
    entries = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == "epoch"]


def listed(folder):
    with open(folder / "run" / "unreadable.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["epoch", "path", "cause"]
    return rows


def test_training_goes_on_counts_and_lists(tmp_path, lists, demo_root, capsys):
    args = [*lists(1), "--train.batch_size=5", "--train.epochs=2", "--data.timeout=2"]
    assert run(cli.train, *args, f"--data.val={tmp_path}/list.txt", "--data.workers=1") == 0
    assert [entry["unreadable"] for entry in epochs(tmp_path)] == [1, 1]
    assert [entry["val_failed"] for entry in epochs(tmp_path)] == [1, 1]
    pipe = f"{tmp_path}/pipe0.mp4"
    cause = f"{pipe}: not a regular file"
    assert listed(tmp_path) == [[epoch, pipe, "not a regular file"] for epoch in "12"]
    assert "validation could not read 1 videos, the first: " + cause in capsys.readouterr().out


@pytest.mark.parametrize(("share", "code"), [(0.25, 0), (0.15, 2)])
def test_the_share_is_of_the_whole_epoch(tmp_path, lists, demo_root, capsys, share, code):
    few = sorted(demo_root.glob("train/*/*.mp4"))[:4]  # of five files one is bad, wherever it comes
    args = [*lists(1, few), "--train.batch_size=1", f"--data.max_unreadable={share}", "--data.val=null"]
    assert run(cli.train, *args) == code
    errors = capsys.readouterr().err.strip().splitlines()
    if code:
        assert errors[-1] == (
            "error: 1 unreadable videos are more than data.max_unreadable=0.15 of the 5 of an epoch, "
            f"the first: {tmp_path}/pipe0.mp4: not a regular file"
        )


def test_too_many_stop_the_epoch_early(tmp_path, lists, capsys):
    args = [*lists(24), "--train.batch_size=1", "--train.log_every=1", "--data.val=null"]
    assert run(cli.train, *args) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert "of the 48 of an epoch" in errors[-1]
    assert 5 <= len(listed(tmp_path)) <= 5 + 9
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) < 24


def test_all_ranks_stop(tmp_path, lists):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    args = [*lists(12), "--train.batch_size=1", "--train.log_every=2", "--data.val=null"]
    done = subprocess.run([*command, TRAIN_NET, *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines  # of the first rank to end; the launcher may end the other before it says the same
    assert all("data.max_unreadable=0.1 of the 36 of an epoch" in line for line in lines)
    assert listed(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, demo_root):
    folder = tmp_path_factory.mktemp("checkpoint")
    args = settings(folder, demo_root)
    assert run(cli.train, *args, *PLAIN, "--data.val=null", f"--output={folder}/run") == 0
    return folder / "run" / "last.pt"


def score(tmp_path, demo_root, checkpoint, names, *flags):
    lines = [f"{name} {i % 8}" for i, name in enumerate(names)]
    (tmp_path / "test.txt").write_text("\n".join(lines))
    args = [
        *settings(tmp_path, demo_root),
        f"--data.test={tmp_path}/test.txt",
        f"--checkpoint={checkpoint}",
    ]
    assert run(cli.test, *args, f"--output={tmp_path}/out", "--data.timeout=2", *flags) == 0
    with open(tmp_path / "out" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return json.loads((tmp_path / "out" / "report.json").read_text()), rows


@pytest.mark.parametrize("rule", ["wrong", "exclude"])
@pytest.mark.parametrize("workers", [0, 1])
def test_scoring_swaps_nothing(tmp_path, demo_root, checkpoint, capsys, rule, workers):
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    names = [pipe, *sorted(demo_root.glob("test/*/*.mp4"))]
    flags = [f"--eval.on_failure={rule}", f"--data.workers={workers}"]
    report, rows = score(tmp_path, demo_root, checkpoint, names, *flags)
    counts = {key: report[key] for key in ("num_videos", "num_failed", "num_scored", "on_failure")}
    assert counts == {"num_videos": 12, "num_failed": 1, "num_scored": 11, "on_failure": rule}
    assert [row["path"] for row in rows] == [str(name) for name in names]
    assert [row["failure"] for row in rows] == ["not a regular file"] + [""] * 11
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert report["top1"] == pytest.approx(right / (12 if rule == "wrong" else 11))
    told = {"wrong": "1 unreadable (counted as wrong)", "exclude": "1 unreadable (left out)"}[rule]
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("rule", ["wrong", "exclude"])
def test_nothing_readable_at_all(tmp_path, demo_root, checkpoint, rule):
    names = [tmp_path / "gone1.mp4", tmp_path / "gone2.mp4"]
    report, rows = score(tmp_path, demo_root, checkpoint, names, f"--eval.on_failure={rule}")
    assert report["num_failed"] == 2
    assert report["num_scored"] == 0
    assert report["top1"] == (0 if rule == "wrong" else None)
    assert report["mean_class_accuracy"] == (0 if rule == "wrong" else None)
    assert {row["prediction"] for row in rows} == {"-1"}


def test_figures_without_the_unreadable_ones():
    scores = Scores(
        scores=np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0, 0, 0], [0, 0, 0]], np.float32),
        labels=np.array([0, 1, 1, 2]),
        views_right=np.array([0.5, 0.25, 0, 0]),
        failures={2: "gone", 3: "gone"},
        on_failure="exclude",
    )
    assert scores.figures() == pytest.approx(
        {"top1": 1 / 2, "top5": 1, "mean_class_accuracy": 1 / 2, "per_clip_top1": 3 / 8}
    )


def test_predict_gives_up_what_hangs(tmp_path, demo_root, checkpoint, capsys, monkeypatch):
    import time

    from stvit_video import recognizer

    good = next(demo_root.glob("test/*/*.mp4"))
    (tmp_path / "hang.mp4").write_text("")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "link.mp4").symlink_to(good)
    real = recognizer.open_video
    monkeypatch.setattr(
        recognizer,
        "open_video",
        lambda path, *rest: time.sleep(1000) if path.name == "hang.mp4" else real(path, *rest),
    )
    names = [tmp_path / "hang.mp4", tmp_path / "pipe.mp4", tmp_path / "link.mp4", good]
    assert run(cli.predict, f"--checkpoint={checkpoint}", "--timeout=1", "--json", *names) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[0]["error"] == f"{names[0]}: took longer than 1 s (data.timeout)"
    assert found[1]["error"] == f"{names[1]}: not a regular file"
    assert found[2]["predictions"] == found[3]["predictions"]


def test_shares_are_of_the_same_files_not_names(tmp_path, demo_root, checkpoint, monkeypatch):
    clips = sorted(demo_root.glob("test/*/*.mp4"))
    shutil.copytree(clips[0].parent, tmp_path / "copy")
    write = Shares.write
    monkeypatch.setattr(Shares, "write", lambda *args: write(*args, now=True))
    monkeypatch.setattr(Shares, "discard", lambda shares: None)
    score(tmp_path, demo_root, checkpoint, [clips[0]])
    monkeypatch.setattr(Classification, "records", None)  # which the same list does not need
    score(tmp_path, demo_root, checkpoint, [clips[0]])
    with pytest.raises(TypeError, match="NoneType"):
        score(tmp_path, demo_root, checkpoint, [tmp_path / "copy" / clips[0].name])


def test_scores_that_are_not_finite_are_wrong_and_told(tmp_path, demo_root, checkpoint, monkeypatch):
    clips, view_scores = sorted(demo_root.glob("test/*/*.mp4"))[:3], Classification.view_scores
    whole = score(tmp_path, demo_root, checkpoint, clips)[1]

    def overflow(*args):
        scores = view_scores(*args)
        scores[0, 1] = float("nan")
        return scores

    monkeypatch.setattr(Classification, "view_scores", overflow)
    report, rows = score(tmp_path, demo_root, checkpoint, clips, "--eval.batch_size=3")
    assert (report["num_failed"], rows[0]["prediction"]) == (1, "-1")
    assert rows[0]["failure"] == "scores that are not finite, in fp32"
    assert rows[1:] == whole[1:]
