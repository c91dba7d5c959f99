"""Several processes: they score like one, share a model, stop together, and go on after one died."""

import copy
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import finish, free_port, launch
from test_end_to_end import SMALL, TRAIN_NET, assert_same, assert_same_runs, figures, run
from test_runs import children, entries, wait_for

from stvit_video import build, cli, create_model
from stvit_video.config import Config, ModelConfig, from_dict
from stvit_video.data.dataset import VideoDataset
from stvit_video.engine import checkpoint, distributed, parallel
from stvit_video.engine.job import Job
from stvit_video.engine.train import LoopConfig, start_run
from stvit_video.tasks.classification import Classification

SMALL = SMALL.replace("batch_size: 4", "batch_size: 2")


@pytest.fixture(scope="module")
def args(tmp_path_factory, demo_root):
    path = tmp_path_factory.mktemp("ranks") / "small.yaml"
    path.write_text(SMALL)
    return ["--cfg", str(path), f"--data.train={demo_root}/train", f"--data.val={demo_root}/test"]


def train_on(ranks, output, *given, before=None):
    """Train in so many processes -> what they printed."""
    log = output.with_suffix(".txt")
    codes = finish(launch(cli.train, *given, f"--output={output}", ranks=ranks, log=log, before=before))
    assert codes == [0] * ranks, log.read_text()
    return log.read_text()


@pytest.fixture(scope="module")
def unbroken(args, tmp_path_factory):
    """The same run on two ranks as ddp and as fsdp2."""
    folder = tmp_path_factory.mktemp("unbroken")
    for kind in ("ddp", "fsdp2"):
        train_on(2, folder / kind, *args, f"--train.parallel={kind}")
    return folder


@pytest.fixture(scope="module")
def broken(args, tmp_path_factory):
    """The same two runs, ended by SIGTERM to one of the ranks within the first epoch."""
    folder = tmp_path_factory.mktemp("broken")
    for kind in ("ddp", "fsdp2"):
        given = [*args, f"--output={folder}/{kind}", f"--train.parallel={kind}"]
        both = launch(cli.train, *given, ranks=2, log=folder / "out.txt")
        wait_for(lambda: entries(folder / kind) >= 1)  # noqa: B023
        os.kill(both[1].pid, signal.SIGTERM)
        assert finish(both) == [143, 143], (folder / "out.txt").read_text()
        assert 0 < checkpoint.load(folder / kind / "last.pt")["so_far"]["batches"] <= 6
    assert "Traceback" not in (folder / "out.txt").read_text()
    return folder


def assert_close_runs(a, b):
    """Losses to 1e-5, and states of one form that differ by rounding alone."""
    for x, y in zip(figures(a), figures(b), strict=True):
        assert x.keys() == y.keys()
        for key in ("loss", "lr", "step", "epoch"):
            assert x.get(key) == pytest.approx(y.get(key), abs=1e-5)
    states = [checkpoint.load(folder / "last.pt") for folder in (a, b)]
    for state in states:
        del state["config"], state["best"]
    assert_close(*states)


def assert_close(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)  # AdamW divides small by small
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_close(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_close(x, y)
    else:
        assert a == b or a == pytest.approx(b, abs=1e-5)


def assert_shared(args):
    """A command: each rank of fsdp2 holds half of every block."""
    distributed.start("cpu")
    model = build.build_model(Config(model=ModelConfig(name="vit_tiny_patch16_224", depth=2)), 4)
    whole = sum(p.numel() for p in model.blocks.parameters())
    parallel.wrap(model, "fsdp2", torch.device("cpu"))
    assert sum(p.to_local().numel() for p in model.blocks.parameters()) == whole / 2
    sharded = {name for name, module in model.named_modules() if parallel.is_sharded(module)}
    assert sharded == {"", "blocks.0", "blocks.1"}
    distributed.stop()


def test_ranks_share_the_model(tmp_path):
    log = tmp_path / "out.txt"
    assert finish(launch(assert_shared, ranks=2, log=log)) == [0, 0], log.read_text()


def assert_reducers_train(args):
    """A command: every reducer finds the shared layers whole; its loss is that of one process."""
    distributed.start("cpu")
    for reducer in ("semantic", "pool", "random", "tome"):
        sizes = {"depth": 4, "base_depth": 1, "reducer": reducer, "checkpointing": reducer == "tome"}
        torch.manual_seed(0)
        model = create_model("stvit_tiny_patch16_224", num_classes=4, image_size=64, **sizes)
        alone = copy.deepcopy(model)
        parallel.wrap(model, "fsdp2", torch.device("cpu"))
        clip, losses = torch.randn(1, 3, 16, 64, 64), []
        for each in (model, alone):
            torch.manual_seed(1)
            losses.append(each(clip).square().mean())
            losses[-1].backward()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
        gradient = model.blocks[1].mlp.fc1.weight.grad.full_tensor()
        torch.testing.assert_close(gradient, alone.blocks[1].mlp.fc1.weight.grad)
    distributed.stop()


def test_reducers_train_on_shared_models(tmp_path):
    log = tmp_path / "out.txt"
    assert finish(launch(assert_reducers_train, ranks=2, log=log)) == [0, 0], log.read_text()


def assert_statistics_are_the_first_ranks(args):
    """A command: buffers, which are not sharded, and their averages are alike where it matters."""
    distributed.start("cpu")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    config = LoopConfig(parallel="fsdp2", ema=0.5, clip_grad=1.0)
    kept = start_run(Job(None, model, torch.device("cpu"), None, None, {}), config, updates_an_epoch=9)
    for _ in range(3):
        model[1].running_mean += 100 * distributed.rank()
        kept.model(torch.randn(5, 3) + distributed.rank()).square().mean().backward()
        kept.change(parallel.gradient_norm(kept.bare))
        assert model[1].running_mean.max() < 50, "a forward pass begins with the first rank's"
    scored = kept.scored_model()
    for part in (scored.state_dict(), kept.scored_model().state_dict()):
        parts = [None, None]
        torch.distributed.all_gather_object(parts, part)
        first, second = parts
        assert_same(dict(first), dict(second))
    state = kept.state()
    if distributed.is_main():
        assert_same(dict(scored.state_dict()), dict(state["ema"]))
        assert state["model"]["0.weight"].shape == (4, 3)
        assert state["model"]["1.num_batches_tracked"] == 3
    distributed.stop()


def test_shared_models_have_the_first_ranks_statistics(tmp_path):
    log = tmp_path / "out.txt"
    started = launch(assert_statistics_are_the_first_ranks, ranks=2, log=log)
    assert finish(started) == [0, 0], log.read_text()


def test_sharded_training_is_training(unbroken):
    assert_close_runs(unbroken / "ddp", unbroken / "fsdp2")


@pytest.mark.parametrize("before", ["ddp", "fsdp2"])
@pytest.mark.parametrize("after", ["ddp", "fsdp2"])
def test_checkpoints_do_not_know_how_they_were_trained(args, unbroken, broken, tmp_path, before, after):
    shutil.copytree(broken / before, tmp_path / "run")
    said = train_on(2, tmp_path / "run", *args, f"--train.parallel={after}", "--resume")
    assert "continuing after update" in said
    if before == after:
        assert_same_runs(unbroken / after, tmp_path / "run")
    else:
        assert_close_runs(unbroken / after, tmp_path / "run")


def test_a_sharded_checkpoint_loads_into_one_process(args, unbroken, tmp_path):
    state = checkpoint.load(unbroken / "fsdp2" / "last.pt")
    config = from_dict(state["config"], "")
    model = build.build_model(config, len(state["class_names"]))
    job = Job(None, model, torch.device("cpu"), None, None, {})
    one = start_run(job, config.train, updates_an_epoch=3)
    one.load(state)
    assert_same({key: state[key] for key in one.state()}, one.state())
    for kind in ("ddp", "fsdp2"):
        given = [*args, f"--checkpoint={unbroken}/{kind}/last.pt", f"--output={tmp_path}/{kind}"]
        assert run(cli.test, *given) == 0
    a, b = (table(tmp_path / kind) for kind in ("ddp", "fsdp2"))
    for x, y in zip(a, b, strict=True):
        assert float(x["top1_score"]) == pytest.approx(float(y["top1_score"]), abs=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_skip_an_update_together(args, tmp_path, kind):
    def break_one(rank):
        if rank == 1:
            loss, calls = Classification.loss, iter(range(1000))

            def broken(*args):
                return {"loss": loss(*args)["loss"] * (torch.nan if next(calls) == 3 else 1)}

            Classification.loss = broken

    given = [*args, "--train.epochs=1", "--train.eval_every=2", f"--train.parallel={kind}"]
    train_on(2, tmp_path / "run", *given, before=break_one)
    losses = [entry["loss"] for entry in figures(tmp_path / "run")]
    assert [loss is None for loss in losses] == [False, True, False, False]
    with open(tmp_path / "run" / "nonfinite.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rank"], row["loss"] == "nan") for row in rows] == (
        [("0", False)] * 4 + [("1", False)] * 2 + [("1", True)] * 2
    )
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert all(value.isfinite().all() for value in state["model"].values())
    assert {int(values["step"]) for values in state["optimizer"]["state"].values()} == {2}


def table(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def record_reads(rank):
    whole = VideoDataset._sample

    def recorded(data, item, memory):
        with open(os.environ["READ"], "a") as file:
            file.write(f"{item[1]}\n")
        return whole(data, item, memory)

    VideoDataset._sample = recorded


@pytest.mark.parametrize(
    ("videos", "ranks", "options"),
    [
        (11, 1, ["--data.workers=2", "--eval.view_batch=1"]),
        (11, 2, ["--data.workers=0", "--eval.view_batch=100"]),
        (7, 3, ["--data.workers=1", "--eval.batch_size=1"]),
        (2, 3, ["--data.workers=0", "--eval.view_batch=4"]),  # nothing for one rank
    ],
)
def test_scores_do_not_depend_on_who_scores_what(
    args, unbroken, demo_root, tmp_path, monkeypatch, videos, ranks, options
):
    paths = sorted(demo_root.glob("test/*/*.mp4"))[:videos]
    (tmp_path / "list.txt").write_text("".join(f"{path} {i % 8}\n" for i, path in enumerate(paths)))
    given = [*args, f"--checkpoint={unbroken}/ddp/last.pt", f"--data.test={tmp_path}/list.txt"]
    assert run(cli.test, *given, f"--output={tmp_path}/one") == 0
    monkeypatch.setenv("READ", str(tmp_path / "read.txt"))
    log = tmp_path / "out.txt"
    given += [f"--output={tmp_path}/other", *options]
    assert finish(launch(cli.test, *given, ranks=ranks, log=log, before=record_reads)) == [0] * ranks, (
        log.read_text()
    )
    assert sorted(map(int, (tmp_path / "read.txt").read_text().split())) == list(range(videos))
    one, other = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "other"))
    assert one["num_videos"] == videos
    assert one | {"seconds": 0} == other | {"seconds": 0}
    for a, b in zip(table(tmp_path / "one"), table(tmp_path / "other"), strict=True):
        for key in a:
            if key.endswith("_score"):
                assert float(a[key]) == pytest.approx(float(b[key]), abs=1e-5)
            else:
                assert a[key] == b[key]


def torchrun(*words, log):
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, words)]
    with open(log, "a") as out:
        return subprocess.Popen(command, stdout=out, stderr=out)


def ended(jobs, timeout):
    """Their exit codes; none of them is left behind."""
    try:
        return [job.wait(timeout) for job in jobs]
    finally:
        for job in jobs:
            job.kill()


def two_nodes(output, args, log):
    """A job of one process on each of two "nodes"."""
    port = free_port()
    return [
        torchrun(
            *("--nnodes", 2, "--nproc_per_node", 1, "--node_rank", node),
            *("--master_addr", "127.0.0.1", "--master_port", port),
            *(TRAIN_NET, *args, f"--output={output}", "--resume", "--train.checkpoint_minutes=0"),
            log=log,
        )
        for node in range(2)
    ]


def workers_of(job):
    return [pid for pid in children(job.pid) if "train_net" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_nodes_train_like_processes_and_go_down_together(args, unbroken, tmp_path):
    output, log = tmp_path / "run", tmp_path / "out.txt"
    jobs = two_nodes(output, args, log)
    wait_for((output / "last.pt").exists)
    os.kill(workers_of(jobs[1])[0], signal.SIGKILL)
    assert all(ended(jobs, timeout=60))
    assert "Signal 9 (SIGKILL)" in log.read_text()
    assert entries(output) < 8
    assert ended(two_nodes(output, args, log), timeout=180) == [0, 0], log.read_text()
    assert "continuing after update" in log.read_text()
    assert_same_runs(unbroken / "ddp", output)


def test_torchrun_restarts_a_job_and_hands_sigterm_on(args, tmp_path):
    output, log, args = tmp_path / "run", tmp_path / "out.txt", [*args, "--train.epochs=8"]
    given = [TRAIN_NET, *args, f"--output={output}", "--resume", "--train.checkpoint_minutes=0"]
    job = torchrun("--standalone", "--nproc_per_node", 2, "--max-restarts", 1, *given, log=log)
    wait_for((output / "last.pt").exists)
    os.kill(workers_of(job)[1], signal.SIGKILL)
    wait_for(lambda: "continuing after update" in log.read_text())
    done = int(re.search(r"continuing after update (\d+)", log.read_text())[1])
    wait_for(lambda: figures(output)[-1]["step"] > done and (output / "last.pt").exists())
    job.send_signal(signal.SIGTERM)
    assert ended([job], timeout=60) != [0]
    state = checkpoint.load(output / "last.pt")
    assert "no run there yet, starting" in log.read_text()
    assert f"SIGTERM: stopped after update {state['update']}" in log.read_text()
    train_on(2, output, *args, "--resume")
    train_on(2, tmp_path / "unbroken", *args)
    assert_same_runs(tmp_path / "unbroken", output)
