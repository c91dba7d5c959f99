"""Runs that can be trusted: broken off anywhere and continued, they end as if nothing had happened."""

import csv
import itertools
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from launch import CONTEXT, finish, launch
from test_end_to_end import SMALL, assert_same, assert_same_runs, figures, run

from stvit_video import build, cli, files
from stvit_video.data.dataset import TrainSampler, VideoDataset
from stvit_video.engine import checkpoint
from stvit_video.engine.optim import make_schedule
from stvit_video.engine.run import Run
from stvit_video.tasks import classification
from stvit_video.tasks.classification import Classification

SMALL = SMALL.replace("batch_size: 4", "batch_size: 2").replace("flip: swap", "flip: none")


@pytest.fixture(scope="module")
def args(tmp_path_factory, demo_root):
    """A list of 24 videos, of which two cannot be read: 6 updates an epoch."""
    folder = tmp_path_factory.mktemp("runs")
    paths = sorted(demo_root.glob("train/*/*.mp4"))
    for i in (3, 17):
        paths[i] = folder / f"broken{i}.mp4"
        paths[i].write_bytes(b"\0" * 99)
    (folder / "list.txt").write_text("".join(f"{path} {i % 8}\n" for i, path in enumerate(paths)))
    (folder / "small.yaml").write_text(SMALL)
    lists = f"--data.train={folder}/list.txt", f"--data.val={demo_root}/test"
    (folder / "names.txt").write_text("\n".join(sorted(p.name for p in (demo_root / "test").iterdir())))
    return ["--cfg", f"{folder}/small.yaml", *lists, f"--data.class_names={folder}/names.txt"]


@pytest.fixture(scope="module")
def unbroken(args, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken") / "run"
    assert run(cli.train, *args, f"--output={output}", "--train.checkpoint_minutes=null") == 0
    return output


def assert_same_to_the_lists(a, b):
    assert_same_runs(a, b)
    assert (a / "unreadable.csv").read_bytes() == (b / "unreadable.csv").read_bytes()


def entries(output):
    return len(figures(output)) if (output / "log.jsonl").exists() else 0


def children(pid):
    return map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize(("workers", "where"), [(0, "worker"), (2, "device")])
def test_sigterm_ends_a_run_at_an_update_and_it_goes_on_there(
    unbroken, args, tmp_path, monkeypatch, workers, where
):
    """Wherever pixels are changed: on the CPU they are the same."""
    output, log = tmp_path / "run", tmp_path / "out.txt"
    args = [*args, f"--data.augment_on={where}"]
    given = [*args, f"--output={output}", "--resume", f"--data.workers={workers}"]
    (process,) = launch(cli.train, *given, log=log)
    wait_for(lambda: entries(output) >= 2)
    for _ in range(3):  # impatience changes nothing
        os.kill(process.pid, signal.SIGTERM)
        for worker in children(process.pid):  # schedulers send it to all processes of a job
            os.kill(worker, signal.SIGTERM)
    assert finish([process]) == [143]
    text = log.read_text()
    assert "SIGTERM: stopped after update" in text
    assert "Traceback" not in text
    state = checkpoint.load(output / "last.pt")
    done = state["so_far"]["batches"]
    assert 4 <= done < 12, "broken off within the first epoch"
    assert state["update"] == entries(output) == done / 2

    read, sample = [], VideoDataset._sample
    with monkeypatch.context() as patch:
        patch.setattr(
            VideoDataset,
            "_sample",
            lambda data, item, memory: (
                read.append((data.substitute, item[0])) or sample(data, item, memory)
            ),
        )
        assert run(cli.train, *args, f"--output={output}", "--resume") == 0
    assert read.count((True, 0)) == 24 - 2 * done  # what the first part trained on is not read again
    assert_same_to_the_lists(unbroken, output)


def slow_validation(rank):
    view_scores = Classification.view_scores
    Classification.view_scores = lambda *args: time.sleep(0.5) or view_scores(*args)


def test_sigterm_in_a_validation_ends_it_and_the_epoch_is_not_lost(unbroken, args, tmp_path):
    output = tmp_path / "run"
    (process,) = launch(cli.train, *args, f"--output={output}", before=slow_validation)
    wait_for((output / "last.pt").exists)  # the first epoch's end, before its validation
    os.kill(process.pid, signal.SIGTERM)
    assert finish([process]) == [143]
    assert entries(output) == 6
    assert checkpoint.load(output / "last.pt")["so_far"]["batches"] == 12
    assert run(cli.train, *args, f"--output={output}", "--resume") == 0
    assert_same_to_the_lists(unbroken, output)


def test_a_folder_in_which_another_process_trains_is_refused(args, tmp_path, capsys):
    """Once that is killed the next one may begin: see `kill_until_done`."""
    output = tmp_path / "run"
    (process,) = launch(cli.train, *args, f"--output={output}", before=slow_validation)
    wait_for((output / "last.pt").exists)
    written = (output / "log.jsonl").read_bytes()
    for how in ("--resume", "--overwrite"):
        assert run(cli.train, *args, f"--output={output}", how) == 2
        assert capsys.readouterr().err == f"error: output={output}: another process trains there\n"
    process.kill()
    assert finish([process]) == [-9]
    assert (output / "log.jsonl").read_bytes().startswith(written)


def kill_until_done(given, output, kills):
    """Start, SIGKILL at a random moment, and so on; -> how many kills hit a checkpoint being written."""
    rng, hits = random.Random(kills), 0
    for kill in range(kills):
        (process,) = launch(cli.train, *given)
        if rng.random() < 0.3:  # some while it starts, the others one to three updates later
            time.sleep(rng.uniform(0, 0.3))
        else:
            goal = entries(output) + rng.randint(1, 3)
            wait_for(lambda: entries(output) >= goal or process.exitcode is not None)  # noqa: B023
            time.sleep(rng.uniform(0, 0.03))
        process.kill()
        assert finish([process]) == [-9], f"done before kill {kill + 1}: nothing was tested"
        hits += any(output.glob("*.pt.part"))
    assert finish(launch(cli.train, *given)) == [0]
    return hits


@pytest.mark.parametrize(
    ("kills", "epochs"), [(3, 2), pytest.param(20, 12, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_killed_at_any_moment_a_run_ends_as_if_unbroken(args, tmp_path, kills, epochs):
    given = [*args, f"--train.epochs={epochs}", "--data.workers=2"]
    assert run(cli.train, *given, f"--output={tmp_path}/unbroken") == 0
    began, output = time.monotonic(), tmp_path / "killed"
    given += [f"--output={output}", "--resume", "--train.checkpoint_minutes=0"]
    hits = kill_until_done(given, output, kills)
    print(f"{kills} kills in {time.monotonic() - began:.0f} s, {hits} while a checkpoint was written")
    assert_same_to_the_lists(tmp_path / "unbroken", output)


def save_killed_after(steps, folder, values):
    """Save in a process that is killed after so many steps of writing; -> whether it was."""
    count = itertools.count()

    def counted(whole):
        def step(*given):
            if next(count) >= steps:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*given)

        return step

    def work():
        for owner, name in ((os, "fsync"), (os, "replace"), (files._Hashed, "write")):
            setattr(owner, name, counted(getattr(owner, name)))
        checkpoint.save_last(folder, values)

    process = CONTEXT.Process(target=work)
    process.start()
    return finish([process]) != [0]


def test_a_checkpoint_is_complete_whichever_step_of_writing_is_the_last(tmp_path):
    for steps in range(100):
        for number in range(2):
            checkpoint.save_last(tmp_path, {"number": number})
        killed = save_killed_after(steps, tmp_path, {"number": 2, "weights": torch.zeros(10)})
        values, damage = checkpoint.load_last(tmp_path)
        assert values["number"] in (1, 2)
        assert damage is None
        checkpoint.tidy(tmp_path, last_is_damaged=False)
        if not killed:
            break
    assert steps > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last-previous.pt", "last.pt"]


def save_on_a_full_disk(args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    with pytest.raises(checkpoint.CheckpointError, match=r"last.pt: cannot be written \(File too large\)"):
        checkpoint.save_last(Path(args[0]), {"weights": torch.zeros(5000)})


def test_a_disk_that_is_full_is_one_line_and_costs_no_checkpoint(tmp_path):
    checkpoint.save_last(tmp_path, {"number": 1})
    log = tmp_path / "out.txt"
    assert finish(launch(save_on_a_full_disk, tmp_path, log=log)) == [0], log.read_text()
    assert checkpoint.load_last(tmp_path)[0]["number"] == 1


def test_best_and_last_agree_after_a_kill_between_them(unbroken, args, tmp_path, monkeypatch):
    whole, saves = checkpoint.save_last, []

    def killed(folder, values):
        saves.append(values["epoch"])
        if saves == [0, 1]:  # the end of the first epoch, its best.pt just written
            raise KeyboardInterrupt
        whole(folder, values)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_last", killed)
        assert run(cli.train, *args, f"--output={tmp_path}/run") == 130
    assert checkpoint.load(tmp_path / "run" / "best.pt")["epoch"] == 1
    assert checkpoint.load(tmp_path / "run" / "last.pt")["epoch"] == 0
    assert run(cli.train, *args, f"--output={tmp_path}/run", "--resume") == 0
    assert_same_to_the_lists(unbroken, tmp_path / "run")


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(unbroken, args, tmp_path, capsys):
    output = tmp_path / "run"
    given = [*args, f"--output={output}", "--resume"]
    shutil.copytree(unbroken, output)
    damage(output / "last.pt")
    assert run(cli.train, *given) == 0
    captured = capsys.readouterr()
    assert "warning" in captured.err
    assert str(output / "last.pt") in captured.err
    assert "continuing after update 12" in captured.out  # of which the validation is repeated
    assert (output / "last-damaged.pt").exists()
    assert_same_to_the_lists(unbroken, output)

    before = figures(output)
    for name in ("last.pt", "last-previous.pt"):
        damage(output / name)
    assert run(cli.train, *given) == 2
    assert capsys.readouterr().err.startswith("error: no checkpoint to continue: ")
    (output / "last.pt").unlink(), (output / "last-previous.pt").unlink()
    assert run(cli.train, *given) == 2  # best.pt alone cannot be continued, and is not discarded unasked
    assert "holds best.pt but no last.pt" in capsys.readouterr().err
    assert figures(output) == before


def test_a_run_does_not_depend_on_the_number_of_workers(unbroken, args, tmp_path):
    assert run(cli.train, *args, f"--output={tmp_path}/run", "--data.workers=3") == 0
    with pytest.raises(AssertionError):  # the setting itself is in the checkpoint's settings
        assert_same(*(checkpoint.load(f / "last.pt")["config"] for f in (unbroken, tmp_path / "run")))
    assert_same_to_the_lists(unbroken, tmp_path / "run")


def not_finite_at(patch, calls):
    """The losses of these forward passes, counted from 0, become NaN."""
    count, whole = iter(range(10**6)), classification.F.cross_entropy

    def broken(*given, **options):
        loss = whole(*given, **options)
        return loss * torch.nan if next(count) in calls else loss

    patch.setattr(classification.F, "cross_entropy", broken)


def test_an_update_that_is_not_finite_is_skipped_and_on_record(args, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        not_finite_at(patch, {3, 12, 13})  # of updates 2 and 7: two passes an update, six updates an epoch
        assert run(cli.train, *args, f"--output={tmp_path}/run") == 0
    entries = figures(tmp_path / "run")
    steps = [entry for entry in entries if entry["kind"] == "step"]
    assert [entry["step"] for entry in steps if entry["loss"] is None] == [2, 7]
    assert [entry["step"] for entry in steps] == list(range(1, 13))
    assert [entry["nonfinite"] for entry in entries if entry["kind"] == "epoch"] == [1, 1]
    kept = [entry["loss"] for entry in steps[:6] if entry["loss"] is not None]
    assert entries[6]["loss"] == pytest.approx(sum(kept) / 5)
    with open(tmp_path / "run" / "nonfinite.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["update"]) for row in rows] == [("1", "2")] * 4 + [("2", "7")] * 4
    assert [row["loss"] == "nan" for row in rows] == [False] * 2 + [True] * 6
    order = list(TrainSampler(24, batch_size=2, seed=0))
    assert [int(row["index"]) for row in rows[:4]] == [index for _, index in order[4:8]]
    assert "epoch 1: 1 updates skipped" in capsys.readouterr().out

    with monkeypatch.context() as patch:  # and a run that is resumed in between ends the same
        not_finite_at(patch, {3, 12, 13})
        whole, saves = checkpoint.save_last, []

        def stopped(folder, values):
            whole(folder, values)
            saves.append(values)
            if len(saves) == 3:
                raise KeyboardInterrupt

        patch.setattr(checkpoint, "save_last", stopped)
        given = [*args, f"--output={tmp_path}/two", "--train.checkpoint_minutes=0", "--resume"]
        assert run(cli.train, *given) == 130
    with monkeypatch.context() as patch:
        not_finite_at(patch, {6, 7})  # six passes were done
        assert run(cli.train, *given) == 0
    assert_same_to_the_lists(tmp_path / "run", tmp_path / "two")
    both = [(tmp_path / name / "nonfinite.csv").read_bytes() for name in ("run", "two")]
    assert both[0] == both[1]


def test_skipped_updates_leave_no_trace_in_the_model(args, tmp_path, monkeypatch):
    monkeypatch.setattr(
        classification.F, "cross_entropy", lambda logits, *_, **__: logits.sum() * torch.inf
    )
    given = ["--train.epochs=1", "--train.max_nonfinite=7", "--train.eval_every=9"]
    assert run(cli.train, *args, f"--output={tmp_path}/run", *given) == 0
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    torch.manual_seed(0)
    config, class_names, _ = build.load_model(tmp_path / "run" / "last.pt")
    torch.manual_seed(0)
    fresh = dict(build.build_model(config, len(class_names)).state_dict())
    assert_same(fresh, dict(state["model"]))
    assert_same(fresh, dict(state["ema"]))
    assert state["optimizer"]["state"] == {}
    assert state["update"] == state["in_a_row"] == 6


def test_a_skipped_update_gives_back_the_statistics_of_batchnorm():
    model = torch.nn.BatchNorm1d(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    schedule = make_schedule(optimizer, updates=9, warmup_updates=0, warmup_lr=0.0, min_lr=0.0)
    kept = Run(model, model, None, optimizer, schedule, None, torch.device("cpu"))
    before = [buffer.clone() for buffer in model.buffers()]
    model(torch.full((3, 2), torch.nan)).sum().backward()
    assert not model.running_mean.isfinite().any()
    kept.skip(before)
    assert_same(before, list(model.buffers()))
    assert model.weight.grad is None
    assert (kept.update, kept.in_a_row, kept.so_far.skipped) == (1, 1, 1)


def test_a_run_stops_where_nothing_is_finite(args, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        classification.F, "cross_entropy", lambda logits, *_, **__: logits.sum() * torch.nan
    )
    assert run(cli.train, *args, f"--output={tmp_path}/run", "--train.max_nonfinite=2") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: update 2: loss or gradient not finite 2 times in a row")
    assert str(tmp_path / "run" / "nonfinite.csv") in error
