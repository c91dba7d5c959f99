"""What hangs or crashes is given up, the rest comes as without a guard, and nobody is left behind."""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from stvit_video.data import dataset as datasets
from stvit_video.data import views
from stvit_video.data.annotations import Row, read_rows
from stvit_video.data.dataset import TrainSampler, VideoDataset, make_loader
from stvit_video.data.guard import GivenUp, Guard, SharedMemory, guarded_map
from stvit_video.data.transforms import TestTransform as CropTransform
from stvit_video.data.transforms import TrainTransform
from stvit_video.errors import DecodeError, InputError


def work(what, *rest):
    """A call of each kind: -> (pid, arrays), or a hang, a crash, an error."""
    match what:
        case "hang":
            time.sleep(1000)
        case "crash":
            faulthandler.disable()  # pytest's traceback
            os.kill(os.getpid(), signal.SIGSEGV)
        case "leave":
            os._exit(3)
        case "refuse":
            raise DecodeError("a.mp4: no good")
        case "bug":
            raise KeyError("what is this")
    return os.getpid(), np.full(rest, 7, np.uint8), np.arange(3)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid):
    """Whether a process ends within some seconds."""
    end = time.monotonic() + 5
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(pid)


def test_arrays_of_any_size_come_from_one_child():
    guard = Guard(work, 30)
    pids = set()
    for size in (10, 0, 5_000_000, 3):
        pid, many, few = guard("go", size)
        assert many.tolist()[:4] == [7] * min(size, 4)
        assert many.size == size
        assert few.tolist() == [0, 1, 2]
        pids.add(pid)
    assert len(pids) == 1
    assert os.getpid() not in pids
    many[:] = 1  # a copy that can be written to, and that the next call leaves alone
    guard("go", 3)
    assert many.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        ("hang", r"took longer than 0.3 s \(data.timeout\)"),
        ("crash", r"the decoder crashed \(signal 11\)"),
        ("leave", r"the decoder crashed \(exit code 3\)"),
    ],
)
def test_a_lost_child_is_replaced(what, cause):
    guard = Guard(work, 0.3)
    before, *_ = guard("go", 1)
    started = time.monotonic()
    with pytest.raises(GivenUp, match=cause):
        guard(what)
    assert time.monotonic() - started < 2
    assert not alive(before)
    after, *_ = guard("go", 1)
    assert after != before


def memories():
    """Those that this process holds."""
    held = set()
    for file in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing
            if "clips" in os.readlink(f"/proc/self/fd/{file}"):
                held.add(os.fstat(int(file)).st_ino)
    return held


def fill(value, size, memory):
    return memory.empty([size]).fill_(value).numpy(), memories()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed from /proc")
def test_a_batch_of_many_samples_holds_few_files_and_no_batch_before_it():
    """A process may have 1,024 open files; a child keeps no memory that was there when it was forked."""
    guard, before, others = Guard(fill, 20), len(os.listdir("/proc/self/fd")), memories()
    for _ in range(3):
        memory = SharedMemory()
        parts = [guard(i % 256, 5000, memory) for i in range(300)]
        assert len(os.listdir("/proc/self/fd")) - before < 20
        assert {len(held - others) for _, held in parts} == {1}
        flat = memory.tensor()
        assert flat.view(300, 5000).equal((torch.arange(300) % 256).byte()[:, None].expand(-1, 5000))
        assert [memory.place(values) for values, _ in parts] == list(range(0, flat.numel(), 5000))
    guard.close()


def test_errors_pass_and_keep_the_child():
    guard = Guard(work, 1e9)  # longer than the kernel waits
    before, *_ = guard("go", 1)
    with pytest.raises(DecodeError, match="^a.mp4: no good$"):
        guard("refuse")
    with pytest.raises(RuntimeError, match=r"KeyError: 'what is this'(.|\n)*in work"):
        guard("bug")
    assert guard("go", 1)[0] == before


def test_an_interrupted_call_leaves_no_late_answer():
    guard = Guard(work, 30)
    guard("go", 1)

    def interrupt(*_):
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            guard("hang")
    finally:
        signal.signal(signal.SIGALRM, former)
    assert guard("go", 2)[1].size == 2


def test_a_child_that_ended_between_calls_is_replaced():
    guard = Guard(work, 30)
    pid, *_ = guard("go", 1)
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    assert guard("go", 1)[0] != pid


def test_a_fork_of_the_parent_has_its_own_child():
    guard = Guard(work, 30)
    pid, *_ = guard("go", 1)
    link, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=lambda: its.send(guard("go", 1)[0]))
    process.start()
    assert link.recv() != pid
    process.join()
    assert guard("go", 1)[0] == pid


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="only Linux ends children with their parent")
def test_no_child_survives_its_killed_parent():
    link, its = multiprocessing.Pipe()

    def parent():
        guard = Guard(work, 30)
        its.send(guard("go", 1)[0])
        guard("hang")

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    pid = link.recv()
    assert alive(pid)
    process.kill()
    process.join()
    assert gone(pid)


def test_guarded_map_gives_each_item_once():
    items = ["go", "hang", "crash", "go", "go"] * 2
    found = list(guarded_map(work, items, workers=3, timeout=0.5))
    assert sorted(item for item, _ in found) == sorted(items)
    for item, result in found:
        assert isinstance(result, GivenUp) == (item != "go")
    pids = {result[0] for item, result in found if item == "go"}
    assert all(gone(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="KeyError"):
        list(guarded_map(work, ["bug"], workers=1, timeout=None))


# The data set


def pipe_folder(folder):
    """A folder of frames, one of them a pipe without a writer: to open it is to wait for good."""
    folder.mkdir()
    os.mkfifo(folder / "img_1.png")
    return folder


def _hang(path, *_, **__):
    if "hang" in str(path):
        time.sleep(1000)
    return _hang.open_video(path, *_, **__)


_hang.open_video = datasets.open_video


@pytest.fixture
def rows(demo_root, tmp_path):
    """A row that hangs (once `_hang` opens it) in front of five good ones."""
    paths = sorted((demo_root / "train").glob("*/*.mp4"))[:5]
    return [Row(str(tmp_path / "hang.mp4"), 0), *(Row(str(path), i) for i, path in enumerate(paths))]


def train_set(rows, **options):
    transform = TrainTransform(32, rand_augment=(2, 5))
    make = views.TrainViews(views.Sampling("dense", 4, 2), transform, 2)
    return VideoDataset(rows, make, seed=1, substitute=True, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_hung_video_is_stood_in_for(rows, monkeypatch, workers):
    monkeypatch.setattr(datasets, "open_video", _hang)
    data = train_set(rows, timeout=1)
    loader = make_loader(
        data, TrainSampler(6, batch_size=2, seed=0), batch_size=2, workers=workers, pin_memory=False
    )
    for _ in range(2):
        batches = list(loader)
        failures = [failure for batch in batches for failure in batch.failures]
        assert [path for path, _ in failures] == [rows[0].path]
        assert failures[0][1] == f"{rows[0].path}: took longer than 1 s (data.timeout)"
        assert sorted(i for batch in batches for i in batch.indices.tolist()) == list(range(6))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_guard_changes_no_clip(rows, workers):
    rows[0] = Row("nowhere.mp4", 0)  # a substitute's clips, too
    runs = []
    for options in ({}, {"timeout": 30}):
        loader = make_loader(
            train_set(rows, **options),
            TrainSampler(6, batch_size=2, seed=0),
            batch_size=2,
            workers=workers if options else 0,
            pin_memory=False,
        )
        runs.append(list(loader))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.clips, b.clips)
        assert torch.equal(a.targets, b.targets)
        assert a.failures == b.failures


@pytest.mark.parametrize("timeout", [None, 2])
@pytest.mark.parametrize("decoder", ["av", "decord"])
def test_pipes_are_refused_at_once(tmp_path, timeout, decoder):
    os.mkfifo(tmp_path / "a.mp4")
    rows = [Row(str(tmp_path / "a.mp4"), 0), Row(str(pipe_folder(tmp_path / "frames")), 0)]
    make = views.TestViews(views.Sampling("dense", 2, 1), CropTransform(16), clips=1)
    data = VideoDataset(rows, make, decoder=decoder, timeout=timeout)
    for i in range(2):
        sample = data[0, i]
        assert sample.clips is None
        assert "not a regular file" in sample.failures[0][1]


def test_stand_ins_come_from_the_whole_list_in_an_order_of_the_seed():
    data = train_set([Row(str(i), 0) for i in range(2000)])
    first = list(data._candidates(3, seed=7))
    assert first[0] == 3
    assert sorted(first) == list(range(2000))
    assert first == list(data._candidates(3, seed=7)) != list(data._candidates(3, seed=8))
    spread = np.histogram(first[1:81], 4, (0, 2000))[0]  # the first ones are not neighbours
    assert spread.min() >= 8


def test_a_missing_class_folder_costs_no_sample(demo_root, tmp_path):
    rows = [Row(row.path, row.target) for row in read_rows(demo_root / "train")]  # sorted by class
    rows = [Row(f"{tmp_path}/gone{i}.mp4", 5) if row.target == 5 else row for i, row in enumerate(rows)]
    missing = {row.path for row in rows if row.target == 5}
    assert len(missing) == 3
    data = train_set(rows, max_unreadable=0.2)
    again = train_set(rows, max_unreadable=0.2)
    for index, row in enumerate(rows):
        sample = data[0, index]
        assert sample.clips.shape == (2, 3, 4, 32, 32)
        assert 5 not in sample.targets
        assert {path for path, _ in sample.failures} <= missing
        assert bool(sample.failures) == (row.path in missing)
        assert torch.equal(sample.clips, again[0, index].clips)


@pytest.mark.parametrize(("share", "tries"), [(0.0, 1), (0.2, 3), (0.5, 6), (1.0, 10)])
def test_a_sample_gives_up_when_it_alone_has_met_too_many(tmp_path, share, tries):
    rows = [Row(f"{tmp_path}/gone{i}.mp4", 0) for i in range(10)]
    sample = train_set(rows, max_unreadable=share)[0, 4]
    assert sample.clips is None
    paths = [path for path, _ in sample.failures]
    assert len(paths) == len(set(paths)) == tries
    assert paths[0] == rows[4].path


@pytest.mark.parametrize("timeout", [None, 30])
def test_a_bug_is_no_unreadable_file(rows, timeout):
    def broken(video, label, make):
        raise KeyError("oh")

    data = VideoDataset(rows, broken, substitute=True, timeout=timeout)
    with pytest.raises(RuntimeError, match=rf"{rows[1].path}: KeyError: 'oh'"):
        data[0, 1]


def test_what_is_asked_for_wrongly_is_no_unreadable_file(rows):
    data = train_set(rows, timeout=30, decoder="gstreamer")
    with pytest.raises(InputError, match="unknown decoder"):
        data[0, 1]


def elsewhere(video, target, make):
    """Views that do not put their clips where they are told to."""
    return torch.full((1, 3, 2, 4, 4), target, dtype=torch.uint8), [target]


@pytest.mark.parametrize("timeout", [None, 20])
def test_clips_may_lie_elsewhere(rows, timeout):
    dataset = VideoDataset(rows, elsewhere, timeout=timeout)
    sampler = TrainSampler(len(rows), batch_size=2, seed=0)
    for batch in make_loader(dataset, sampler, batch_size=2, workers=1, pin_memory=False):
        assert batch.clips[:, 0, 0, 0, 0, 0].tolist() == batch.targets[:, 0].tolist()
