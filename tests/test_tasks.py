"""What every task keeps: exactly once on any ranks, resumed to the last bit; and each task's figures."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import finish, launch
from test_end_to_end import SMALL, assert_same_runs, figures, run, train_in_two

from stvit_video import cli
from stvit_video.data.batch import Batch
from stvit_video.data.dataset import TestSampler as EverySampler
from stvit_video.data.dataset import TrainSampler, VideoDataset, make_loader
from stvit_video.data.rows import Row
from stvit_video.data.transforms import Normalise, TrainTransform
from stvit_video.data.transforms import TestTransform as CropTransform
from stvit_video.data.views import Sampling, TrainViews
from stvit_video.data.views import TestViews as SpreadViews
from stvit_video.engine import checkpoint
from stvit_video.engine.job import Job, Outcome
from stvit_video.engine.train import LoopConfig, fit
from stvit_video.errors import InputError
from stvit_video.tasks import TASKS, task_class
from stvit_video.tasks.multilabel import MultiLabel

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
NORMALISE = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# what a list's line says of a video of class c, so that every task that names videos has something to learn
LABELS = {"classification": lambda c: f"{c}", "multilabel": lambda c: f"{c // 2},{4 + c % 3}"}


@pytest.fixture(scope="module", params=sorted(LABELS))
def task(request):
    return request.param


@pytest.fixture(scope="module")
def args(task, tmp_path_factory, demo_root):
    folder = tmp_path_factory.mktemp(task)
    for split in ("train", "test"):
        names = sorted(path.name for path in (demo_root / split).iterdir())
        paths = sorted(demo_root.glob(f"{split}/*/*.mp4"))
        lines = [f"{path} {LABELS[task](names.index(path.parent.name))}\n" for path in paths]
        (folder / f"{split}.txt").write_text("".join(lines))
    (folder / "small.yaml").write_text(SMALL.replace("flip: swap", "flip: all"))
    lists = f"--data.train={folder}/train.txt", f"--data.val={folder}/test.txt"
    return ["--cfg", f"{folder}/small.yaml", f"--task={task}", "--data.num_classes=8", *lists]


@pytest.fixture(scope="module")
def unbroken(args, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken") / "run"
    assert run(cli.train, *args, f"--output={output}") == 0
    return output


def test_a_run_logs_and_keeps_what_the_task_watches(task, unbroken):
    kind = task_class(task)
    epochs = [entry for entry in figures(unbroken) if entry["kind"] == "epoch"]
    watched = [f"val_{key}" for key in kind.watched]
    assert all(0 <= entry[key] <= 1 for entry in epochs for key in watched)
    best = max(range(len(epochs)), key=lambda i: (epochs[i][watched[0]], -i))
    assert checkpoint.load(unbroken / "best.pt")["epoch"] == best + 1
    assert checkpoint.load(unbroken / "last.pt")["best"] == epochs[best][watched[0]]


def test_a_run_that_is_resumed_ends_as_if_unbroken(args, unbroken, tmp_path, monkeypatch):
    train_in_two(args, tmp_path / "run", monkeypatch)
    assert_same_runs(unbroken, tmp_path / "run")


def scored(folder):
    """report.json without the time it took; predictions.csv."""
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return json.loads((folder / "report.json").read_text()) | {"seconds": 0}, rows


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_sample_is_scored_once_on_any_number_of_ranks(args, unbroken, tmp_path, ranks):
    given = [*args, f"--checkpoint={unbroken}/best.pt", "--eval.dump_views=true"]
    assert run(cli.test, *given, f"--output={tmp_path}/one") == 0
    log = tmp_path / "out.txt"
    started = launch(cli.test, *given, f"--output={tmp_path}/many", ranks=ranks, log=log)
    assert finish(started) == [0] * ranks, log.read_text()
    (report, rows), (other, other_rows) = scored(tmp_path / "one"), scored(tmp_path / "many")
    assert report == other
    assert len({row["path"] for row in rows}) == len(rows) == report["num_videos"] == 11
    for row, same in zip(rows, other_rows, strict=True):
        for key, value in row.items():
            if key.endswith("_score"):
                assert float(value) == pytest.approx(float(same[key]), abs=1e-5)
            else:
                assert value == same[key]
    views = [np.load(tmp_path / name / "views.npz") for name in ("one", "many")]
    assert views[0]["scores"].shape == (11, 6, 8)
    np.testing.assert_allclose(views[0]["scores"], views[1]["scores"], atol=1e-5)
    assert not (tmp_path / "many" / "shares").exists()
    best = views[0]["scores"].mean(1).max(1)
    np.testing.assert_allclose(best, [float(row["top1_score"]) for row in rows], atol=1e-5)


def test_the_engine_knows_no_class_and_no_label():
    for path in (ROOT / "stvit_video" / "engine").glob("*.py"):
        words = re.findall(r"class_names|labels?\b|top1|top5|softmax|cross_entropy", path.read_text())
        assert not words, f"{path.name}: {words}"


def average_precision_by_hand(chosen, scores):
    """Walk down the ranking, ties together: precision at each new recall."""
    total, value, before = sum(chosen), 0.0, 0
    for threshold in sorted(set(scores), reverse=True):
        above = [c for c, s in zip(chosen, scores, strict=True) if s >= threshold]
        value += (sum(above) - before) / total * sum(above) / len(above)
        before = sum(above)
    return value


def multilabel(on_failure="wrong", **options):
    return MultiLabel([f"c{i}" for i in range(4)], normalise=NORMALISE, on_failure=on_failure, **options)


@pytest.mark.parametrize("on_failure", ["wrong", "exclude"])
def test_mean_average_precision_is_that_of_a_loop(on_failure):
    rng = np.random.default_rng(0)
    targets = [tuple(np.flatnonzero(rng.random(3) < 0.4).tolist()) for _ in range(40)]  # class 3: never
    targets[5] = None
    scores = rng.integers(0, 12, (40, 4)) / 12  # with ties
    records = [{"scores": torch.tensor(row, dtype=torch.float32)} for row in scores]
    failures = {7: "gone", 20: "gone"}
    for i in failures:
        records[i] = None
    rows = [Row(f"{i}.mp4", target) for i, target in enumerate(targets)]
    found = multilabel(on_failure).figures(Outcome(rows, records, failures))["mAP"]
    kept = [i for i in range(40) if i != 5 and (on_failure == "wrong" or i not in failures)]
    each = [
        average_precision_by_hand(
            [c in targets[i] for i in kept],
            [0.0 if records[i] is None else float(records[i]["scores"][c]) for i in kept],
        )
        for c in range(3)
    ]
    assert found == pytest.approx(sum(each) / 3)


def test_several_classes_a_video_are_learnt_by_sigmoids():
    task = multilabel(twins=[1, 0, 2, 3])
    assert task.encode((0, 3)).tolist() == [1, 0, 0, 1]
    assert task.encode(2).tolist() == [0, 0, 1, 0]
    assert task.mirror(task.encode((0, 3))).tolist() == [0, 1, 0, 1]
    logits = torch.tensor([[0.0, 2, -1, 0], [1, 0, 0, 3]])
    targets = torch.stack([task.encode((1,)), task.encode((0, 3))])

    class Batch:
        clips, targets = torch.zeros(2, 1, 3, 1, 2, 2, dtype=torch.uint8), None

    Batch.targets = targets.unsqueeze(1)
    loss = task.loss(lambda clips: logits, Batch)["loss"].item()
    p = 1 / (1 + np.exp(-logits.numpy()))
    chosen = targets.numpy()
    expected = -(chosen * np.log(p) + (1 - chosen) * np.log(1 - p)).mean()
    assert loss == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="list.txt: b.mp4 has no labels"):
        task.check([Row("a.mp4", (1,)), Row("b.mp4", None)], "list.txt")


class Brightness:
    """A task of its own, in a test: how bright a clip is. Its targets are numbers, its records too."""

    watched, outputs = ("closeness",), 1

    def to(self, device):
        return self

    def encode(self, target):
        return torch.tensor(float(target))

    def mirror(self, target):
        return target

    def loss(self, model, batch):
        error = model(batch.clips[:, 0].float() / 255).squeeze(-1) - batch.targets[:, 0]
        return {"loss": error.square().mean(), "bias": error.mean()}

    def records(self, model, batch):
        return model(batch.clips[:, 0].float() / 255).squeeze(-1).tolist()

    def figures(self, outcome):
        errors = [
            abs(record - row.target) for record, row in zip(outcome.records, outcome.rows, strict=True)
        ]
        return {"closeness": math.exp(-sum(errors) / len(errors))}


def test_the_loop_serves_a_task_that_it_has_never_seen(demo_root, tmp_path):
    task, torch_rows = Brightness(), sorted(demo_root.glob("train/*/*.mp4"))
    rows = [Row(str(path), 0.25 + 0.5 * (i % 2)) for i, path in enumerate(torch_rows)]
    sampling, size = Sampling("dense", 2), 16
    train = VideoDataset(rows, TrainViews(sampling, TrainTransform(size)), encode=task.encode)
    test = VideoDataset(rows, SpreadViews(sampling, CropTransform(size)), encode=task.encode)
    options = {"batch_size": 4, "workers": 0, "pin_memory": False, "persistent": False}
    loaders = (
        make_loader(train, TrainSampler(len(rows), batch_size=4, seed=0), **options),
        make_loader(test, EverySampler(len(rows)), **options),
    )
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 2 * size * size, 1))
    job = Job(task, model, CPU, *loaders, details={})
    config = LoopConfig(epochs=2, batch_size=4, lr=1e-3, lr_per=4, warmup_epochs=0, log_every=1)
    assert fit(job, config, output=tmp_path, seed=0, resume=None) == tmp_path / "best.pt"
    entries = figures(tmp_path)
    assert {"loss", "bias"} <= entries[0].keys()
    assert 0 < entries[-1]["val_closeness"] <= 1
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_teacher_has_its_share_of_the_loss(task, share):
    kind, settings = task_class(task), TASKS[task].settings
    clips, targets = torch.randint(0, 256, (4, 1, 3, 2, 8, 8), dtype=torch.uint8), [0, 2, 1, 1]
    taught, plain = (
        kind(list("abc"), normalise=NORMALISE, settings=s)
        for s in (settings(distill=share, label_smoothing=0.1), settings(label_smoothing=0.1))
    )
    encoded = torch.stack([torch.as_tensor(taught.encode(t)) for t in targets]).unsqueeze(1)
    batch = Batch(torch.arange(4), clips, encoded)
    student, taught.teacher = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(384, 3)) for _ in "st"
    )
    labels, losses = plain.loss(student, batch), taught.loss(student, batch)
    pixels = NORMALISE(clips[:, 0])
    logits, scores = student(pixels), taught.activation(taught.teacher(pixels))
    if task == "classification":
        teacher = -(scores * logits.log_softmax(-1)).sum(-1).mean()
    else:
        teacher = -(scores * logits.sigmoid().log() + (1 - scores) * (1 - logits.sigmoid()).log()).mean()
    assert labels.keys() == {"loss"}
    assert torch.allclose(losses["teacher"], teacher, atol=1e-6)
    assert torch.allclose(losses["loss"], (1 - share) * labels["loss"] + share * teacher, atol=1e-6)
    losses["loss"].backward()
    assert all(p.grad is None for p in taught.teacher.parameters())


def test_a_run_learns_from_a_teacher_and_goes_on_alike(args, unbroken, tmp_path):
    """The teacher's weights are no part of the run's; a resumed run asks it again."""
    taught = [*args, f"--train.teacher={unbroken / 'best.pt'}", "--train.distill=1"]
    assert run(cli.train, *taught, f"--output={tmp_path / 'a'}") == 0
    steps = [entry for entry in figures(tmp_path / "a") if entry["kind"] == "step"]
    assert all(entry["loss"] == entry["teacher"] for entry in steps)
    states = [checkpoint.load(folder / "last.pt")["model"] for folder in (tmp_path / "a", unbroken)]
    assert states[0].keys() == states[1].keys()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data.image_size=64", r"train.teacher=\S+best.pt: was trained with data.image_size=\d+, not 64"),
        ("--data.num_classes=9", r"train.teacher=\S+best.pt: its classes are not those of data.train="),
    ],
)
def test_a_teacher_of_other_clips_or_classes_is_refused(args, unbroken, tmp_path, flag, message, capsys):
    taught = [*args, f"--train.teacher={unbroken / 'best.pt'}", f"--output={tmp_path / 'a'}", flag]
    assert run(cli.train, *taught) == 2
    assert re.search(message, capsys.readouterr().err)
