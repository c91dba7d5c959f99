"""The loop: one wait for the device an update, resumed on other ranks, nothing done or kept in vain."""

import copy
import csv
import gc
import itertools
import json
import weakref
from pathlib import Path

import pytest
import torch
from launch import finish, launch
from test_end_to_end import SMALL, figures, run
from torch import Tensor

from stvit_video import cli, create_model
from stvit_video.bench.model import random_batch, trainers_update
from stvit_video.build import load_model
from stvit_video.data.batch import Batch
from stvit_video.data.dataset import TrainSampler
from stvit_video.data.transforms import Normalise
from stvit_video.engine import checkpoint
from stvit_video.engine.job import Job
from stvit_video.engine.train import LoopConfig, Trainer, start_run
from stvit_video.engine.uploads import Uploads
from stvit_video.tasks.classification import Classification

CPU = torch.device("cpu")
NORMALISE = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OLD = Path(__file__).parent / "fixtures" / "checkpoint_version_2.pt"


def tiny(**sizes):
    return create_model(
        "stvit_tiny_patch16_224", num_classes=3, num_frames=2, image_size=32, depth=4,
        embed_dim=12, num_heads=2, base_depth=1, semantic_tokens=(1, 2, 2), **sizes,
    )  # fmt: skip


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


@pytest.fixture
def reads(monkeypatch):
    """A list of what brings a tensor's values to the host: on a GPU each would wait for it."""
    reads = []
    for name in READS:

        def counted(tensor, *args, name=name, method=getattr(Tensor, name), **options):  # noqa: B008
            reads.append(name)
            return method(tensor, *args, **options)

        monkeypatch.setattr(Tensor, name, counted)
    return reads


@pytest.mark.parametrize("ema", [None, 0.9])
def test_an_update_waits_for_the_device_once(reads, ema):
    task = Classification("abc", normalise=NORMALISE)
    job = Job(task, tiny().train(), CPU, None, None, {})
    kept = start_run(job, LoopConfig(clip_grad=1.0, ema=ema), updates_an_epoch=9)
    step = kept.optimizer.step

    def without_counting(*args, **options):  # on CUDA it is the fused one, which reads nothing
        before = len(reads)
        step(*args, **options)
        del reads[before:]

    kept.optimizer.step = without_counting
    uploads = Uploads([random_batch(2, 2, 32, repeats=2) for _ in range(6)], CPU)
    options = {"seed": 0, "prefetch": uploads.prefetch, "flags": lambda: (False, False, 0)}
    kept.make_update(task, uploads, 2, **options)
    reads.clear()
    kept.make_update(task, uploads, 2, **options)
    assert reads == ["tolist"]


def test_the_next_batch_travels_before_the_device_is_waited_for():
    order = []

    class Told(Batch):
        def to(self, device):
            order.append(int(self.indices[0]))
            return self

    class Task(Classification):
        def loss(self, model, batch):
            order.append("loss")
            return super().loss(model, batch)

    batches = [Told(**vars(random_batch(1, 2, 32)) | {"indices": torch.tensor([i])}) for i in range(3)]
    task = Task("abc", normalise=NORMALISE)
    kept = start_run(Job(task, tiny(), CPU, None, None, {}), LoopConfig(), updates_an_epoch=9)
    uploads = Uploads(batches, CPU)
    flags = lambda: order.append("wait") or ()  # noqa: E731
    for _ in range(3):
        kept.make_update(task, uploads, 1, seed=0, flags=flags, prefetch=uploads.prefetch)
    assert order == [0, "loss", 1, "wait", "loss", 2, "wait", "loss", "wait"]


def test_what_a_run_was_resumed_from_is_let_go(tmp_path):
    class Loader(list):
        sampler = dataset = None

    def job():
        torch.manual_seed(0)
        details = {"config": {"train": {"accumulate": 1}}}
        return Job(Classification("abc", normalise=NORMALISE), tiny(), CPU, Loader([0] * 4), None, details)

    options = {"output": tmp_path, "seed": 0}
    first = Trainer(job(), LoopConfig(ema=0.9), **options, resume=None)
    first.run.make_update(first.job.task, iter([random_batch(2, 2, 32)]), 1, seed=0)
    state = copy.deepcopy(first.run.state() | first.job.details)
    tensors = [weakref.ref(value) for value in (*state["model"].values(), *state["ema"].values())]
    second = Trainer(job(), LoopConfig(ema=0.9), **options, resume=state)
    gc.collect()
    assert state == {}
    assert [ref for ref in tensors if ref() is not None] == []
    assert second.run.update == 1
    for a, b in zip(first.run.bare.parameters(), second.run.bare.parameters(), strict=True):
        assert torch.equal(a, b)


def test_averages_rise_to_their_decay_or_start_there():
    decays = []
    for warmup in (True, False):
        config = LoopConfig(ema=0.9999, ema_warmup=warmup)
        kept = start_run(Job(None, tiny(), CPU, None, None, {}), config, updates_an_epoch=9)
        decays.append([kept.ema.get_decay(step) for step in (2, 47_000)])
    assert decays[0][1] == pytest.approx(0.9992, abs=1e-4)
    assert decays[0][0] < 0.9
    assert decays[1] == [0.9999, 0.9999]


@pytest.mark.parametrize(
    ("ranks", "batch", "accumulate"), [(2, 2, 1), (1, 2, 2), (1, 4, 1), (4, 1, 1), (2, 1, 2)]
)
def test_an_update_has_the_same_videos_however_they_are_dealt(ranks, batch, accumulate):
    """27 videos, 4 an update: 6 updates, and the epoch's last three videos are left out."""
    shape = {"batch_size": batch, "accumulate": accumulate}
    shares = [
        [i for _, i in TrainSampler(27, **shape, seed=3, rank=rank, world=ranks)] for rank in range(ranks)
    ]
    a_rank = batch * accumulate
    updates = [
        {i for share in shares for i in share[start : start + a_rank]}
        for start in range(0, len(shares[0]), a_rank)
    ]
    order = [i for _, i in TrainSampler(27, batch_size=4, seed=3)]
    assert updates == [set(order[start : start + 4]) for start in range(0, 24, 4)]


PLAIN = (
    SMALL.replace("repeats: 2", "repeats: 1")
    .replace("drop_path: 0.1", "drop_path: 0.0")
    .replace("erasing: 0.25, mixup: 0.8, cutmix: 1.0,", "")
)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, demo_root, before, after):
    """Broken off after 4 of 12 updates; losses are those of the unbroken run but for rounding."""
    (tmp_path / "small.yaml").write_text(PLAIN)
    lists = f"--data.train={demo_root}/train", f"--data.val={demo_root}/test"
    args = ["--cfg", f"{tmp_path}/small.yaml", *lists, "--train.checkpoint_minutes=0"]
    shape = {1: ["--train.batch_size=4"], 2: ["--train.batch_size=2"]}
    args += ["--train.accumulate=1"]

    def stop_after_four(rank):
        save_last, saves = checkpoint.save_last, itertools.count(1)

        def stopped(folder, values):
            save_last(folder, values)
            if next(saves) == 4:
                raise KeyboardInterrupt

        checkpoint.save_last = stopped

    log = tmp_path / "out.txt"
    assert run(cli.train, *args, *shape[1], f"--output={tmp_path}/unbroken") == 0
    given = [*args, f"--output={tmp_path}/run", "--resume"]
    codes = finish(launch(cli.train, *given, *shape[before], ranks=before, log=log, before=stop_after_four))
    assert codes[0] == 130, log.read_text()
    assert checkpoint.load(tmp_path / "run" / "last.pt")["update"] == 4
    assert finish(launch(cli.train, *given, *shape[after], ranks=after, log=log)) == [0] * after
    assert "continuing after update 4" in log.read_text()
    assert "within rounding" in log.read_text()
    a, b = (figures(tmp_path / name) for name in ("unbroken", "run"))
    assert [entry["step"] for entry in a] == [entry["step"] for entry in b]
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-4)


def test_a_run_does_not_go_on_with_other_updates_or_other_videos(tmp_path, demo_root, capsys):
    paths = sorted(demo_root.glob("train/*/*.mp4"))
    for name, labels in (("a", range(24)), ("moved", range(24)), ("other", range(1, 25))):
        lines = [f"{path} {label % 8}\n" for path, label in zip(paths, labels, strict=True)]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    (tmp_path / "small.yaml").write_text(PLAIN.replace("flip: swap", "flip: none"))
    args = ["--cfg", f"{tmp_path}/small.yaml", f"--output={tmp_path}/run", "--train.epochs=1", "--resume"]
    assert run(cli.train, *args, f"--data.train={tmp_path}/a.txt") == 0
    assert run(cli.train, *args, f"--data.train={tmp_path}/moved.txt") == 0  # the same list elsewhere
    assert run(cli.train, *args, f"--data.train={tmp_path}/other.txt") == 2
    assert "began with other videos or labels" in capsys.readouterr().err
    assert run(cli.train, *args, f"--data.train={tmp_path}/a.txt", "--train.accumulate=1") == 2
    error = capsys.readouterr().err.strip()
    assert "began with 8 videos an update (train.batch_size 4 x train.accumulate 2 x 1 ranks)" in error
    assert "cannot go on with 4" in error


def test_a_task_is_part_of_a_run_and_its_lists(tmp_path, demo_root, capsys):
    paths = sorted(demo_root.glob("train/*/*.mp4"))
    (tmp_path / "one.txt").write_text("".join(f"{path} {i % 3}\n" for i, path in enumerate(paths)))
    (tmp_path / "many.txt").write_text("".join(f"{path} {i % 3},3\n" for i, path in enumerate(paths)))
    (tmp_path / "small.yaml").write_text(PLAIN.replace("flip: swap", "flip: none"))
    args = ["--cfg", f"{tmp_path}/small.yaml", "--data.num_classes=4", f"--data.train={tmp_path}/one.txt"]
    given = [*args, f"--output={tmp_path}/run", "--train.epochs=1", "--resume"]

    def refused(command, *flags):
        assert run(command, *flags) == 2
        return capsys.readouterr().err.strip()

    assert "has several labels (0, 3)" in refused(cli.train, *given, f"--data.val={tmp_path}/many.txt")
    assert not (tmp_path / "run").exists()
    assert run(cli.train, *given) == 0
    assert "began with task=classification" in refused(cli.train, *given, "--task=multilabel")
    score = [*args, f"--checkpoint={tmp_path}/run/last.pt", f"--output={tmp_path}/scored"]
    assert "made with classification" in refused(cli.test, *score, "--task=multilabel")
    assert "has several labels" in refused(cli.test, *score, f"--data.test={tmp_path}/many.txt")


def test_what_a_broken_off_scoring_did_is_not_done_again(tmp_path, demo_root):
    """Rank 1 of 2 dies while scoring; started again, only its share is read."""
    (tmp_path / "small.yaml").write_text(SMALL)
    lists = f"--data.train={demo_root}/train", f"--data.val={demo_root}/test"
    args = ["--cfg", f"{tmp_path}/small.yaml", *lists]
    assert run(cli.train, *args, f"--output={tmp_path}/run", "--train.epochs=1") == 0
    given = [*args, f"--checkpoint={tmp_path}/run/best.pt", "--eval.batch_size=1"]
    assert run(cli.test, *given, f"--output={tmp_path}/one") == 0

    def die(rank):
        if rank == 1:

            def fail(*_):
                while not list((tmp_path / "two").glob("shares/*.pt")):
                    pass
                raise RuntimeError("as injected")

            Classification.records = fail

    log = tmp_path / "out.txt"
    both = launch(cli.test, *given, f"--output={tmp_path}/two", ranks=2, log=log, before=die)
    assert finish(both)[1] == 1, log.read_text()
    assert "as injected" in log.read_text()
    (share,) = (tmp_path / "two" / "shares").glob("*.pt")
    kept = share.read_bytes()
    assert run(cli.test, *given, f"--output={tmp_path}/two", "--train.precision=bf16") == 0
    assert not share.exists()  # of another precision: not taken up, and gone with the report
    share.parent.mkdir()
    share.write_bytes(kept)
    read, records = [], Classification.records

    def counted(self, model, batch):
        read.extend(batch.indices.tolist())
        return records(self, model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "records", counted)
        assert run(cli.test, *given, f"--output={tmp_path}/two") == 0
    assert read == list(range(1, 11, 2))
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("one", "two")]
    assert reports[0] | {"seconds": 0} == reports[1] | {"seconds": 0}
    assert not (tmp_path / "two" / "shares").exists()
    tables = []
    for name in ("one", "two"):
        with open(tmp_path / name / "predictions.csv", newline="") as file:
            tables.append([row["prediction"] for row in csv.DictReader(file)])
    assert tables[0] == tables[1]


def test_a_checkpoint_of_version_2_scores_as_it_did():
    config, class_names, model = load_model(OLD)
    assert config.train.precision == "auto"  # was bf16: null
    assert class_names[2] == "move_left"
    i = torch.arange(2 * 3 * 4 * 24 * 24)
    clips = ((i * i // 97 + i * 7) % 251).to(torch.uint8).view(2, 3, 4, 24, 24)
    normalise = Normalise(config.data.mean, config.data.std)
    with torch.no_grad():
        scores = model(normalise(clips)).softmax(-1)
    expected = [
        [0.16512002, 0.10720611, 0.09483408, 0.11933041, 0.10336757, 0.12571427, 0.14877166, 0.13565589],
        [0.17409706, 0.11441378, 0.10027993, 0.11402415, 0.10426483, 0.11399402, 0.14214654, 0.13677967],
    ]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_normalising_is_exact_in_any_layout():
    clips = torch.randint(256, (3, 2, 3, 4, 6, 5), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = (clips.float() - 255 * mean) / (255 * std)
    assert torch.equal(NORMALISE(clips), expected)
    turned = NORMALISE(clips.transpose(0, 1))
    assert turned.is_contiguous()
    assert torch.equal(turned, expected.transpose(0, 1))
    assert torch.equal(NORMALISE(clips[0, 0]), expected[0, 0])


def test_the_benchmark_times_the_trainers_own_update():
    """An update of the benchmark changes a model as one of the trainer does, to the last bit."""
    batch, config = random_batch(2, 2, 32), LoopConfig(lr=1e-3, warmup_epochs=0)
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", num_classes=1, num_frames=2, image_size=32, depth=1)
    other = copy.deepcopy(model)
    for _ in range(2):
        update = trainers_update(model, batch, CPU, config)
        update()
    task = Classification(["0"], normalise=NORMALISE)
    for _ in range(2):
        kept = start_run(Job(task, other, CPU, None, None, {}), config, updates_an_epoch=1000)
        kept.model.train()
        kept.make_update(task, iter([batch]), 1, seed=0)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("epochs", "warmup", "reached"), [(10, 2.0, 200), (3, 5.0, 30), (2, 2.0, 20)])
def test_the_learning_rate_is_reached_in_any_run(epochs, warmup, reached):
    config = LoopConfig(epochs=epochs, warmup_epochs=warmup, lr=1e-3)
    kept = start_run(Job(None, tiny(), CPU, None, None, {}), config, updates_an_epoch=100)
    rates = [kept.schedule._get_lr(update)[0] for update in range(epochs * 100)]
    assert rates.index(max(rates)) == reached
    assert max(rates) == 1e-3
