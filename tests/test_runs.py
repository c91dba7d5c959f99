"""Runs that can be trusted: broken off anywhere and continued, they end as if nothing had happened."""

import os
import signal
import time
from pathlib import Path

import pytest
from launch import finish, launch
from test_end_to_end import SMALL, assert_same, figures, run

from stvit_video import cli
from stvit_video.data.dataset import VideoDataset
from stvit_video.engine import checkpoint

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


def assert_same_runs(a, b):
    """Model, averages, optimiser and schedule to the last bit; the log without timings; the lists."""
    for name in ("last.pt", "best.pt"):
        states = [checkpoint.load(folder / name) for folder in (a, b)]
        for state in states:
            del state["config"]
        assert_same(*states)
    assert figures(a) == figures(b)
    assert (a / "unreadable.csv").read_bytes() == (b / "unreadable.csv").read_bytes()


def entries(output):
    return len(figures(output)) if (output / "log.jsonl").exists() else 0


def children(pid):
    return map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_ends_a_run_at_an_update_and_it_goes_on_there(
    unbroken, args, tmp_path, monkeypatch, workers
):
    output, log = tmp_path / "run", tmp_path / "out.txt"
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

    read, whole = [], VideoDataset.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(
            VideoDataset,
            "__getitem__",
            lambda data, item: read.append((data.substitute, item[0])) or whole(data, item),
        )
        assert run(cli.train, *args, f"--output={output}", "--resume") == 0
    assert read.count((True, 0)) == 24 - 2 * done  # what the first part trained on is not read again
    assert_same_runs(unbroken, output)
