"""How processes of a run start and end, and what they compute on."""

import argparse
import copy
import io
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from launch import finish, launch
from test_end_to_end import SMALL, TRAIN_NET, run
from test_ranks import ended, torchrun
from test_runs import wait_for
from torch import nn
from torch.utils.data import DataLoader

from stvit_video import cli, create_model
from stvit_video.cli.common import command
from stvit_video.engine import checkpoint, device, distributed, logs, parallel
from stvit_video.engine.optim import make_optimizer
from stvit_video.engine.preemption import Preemption
from stvit_video.errors import InputError
from stvit_video.files import FileError, read_torch, write_torch
from stvit_video.tasks.classification import Classification

SMALL = SMALL.replace("batch_size: 4", "batch_size: 2")
CPU = torch.device("cpu")


@pytest.fixture
def args(tmp_path, demo_root):
    (tmp_path / "small.yaml").write_text(SMALL)
    return [
        *("--cfg", f"{tmp_path}/small.yaml", f"--output={tmp_path}/run"),
        *(f"--data.train={demo_root}/train", f"--data.val={demo_root}/test", "--data.workers=1"),
    ]


# ---- ends


def fail_on_one(error):
    def before(rank):
        count, view_scores = iter(range(99)), Classification.view_scores

        def failing(*args):
            if rank == 1 and next(count) == 1:
                raise error
            return view_scores(*args)

        Classification.view_scores = failing

    return before


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ZeroDivisionError("as injected"), 1, "ZeroDivisionError: as injected"),
        (InputError("a wrong value"), 2, "error: a wrong value\n"),
    ],
)
def test_an_error_on_one_rank_ends_all(args, tmp_path, error, code, said):
    log = tmp_path / "out.txt"
    both = launch(cli.train, *args, ranks=2, log=log, before=fail_on_one(error))
    wait_for(lambda: said in (log.read_text() if log.exists() else ""))
    began = time.monotonic()
    codes = finish(both, timeout=20)
    assert time.monotonic() - began < 10, "the other rank waits for it"
    assert codes == [1, code], log.read_text()
    assert ("failing" in log.read_text()) == (code == 1), "the traceback of what is no user's error"


def test_leaving_ends_loader_workers(tmp_path):
    """A worker that sleeps for an hour is gone as soon as its rank is."""

    def work(args):
        distributed.start("cpu")
        worker = torch.multiprocessing.get_context("fork").Process(
            target=time.sleep, args=(3600,), daemon=True
        )
        worker.start()
        (tmp_path / f"pid{distributed.rank()}").write_text(str(worker.pid))
        distributed.barrier()
        raise ValueError("as injected")

    assert finish(
        launch(cli.command("never.called")(work), ranks=2, log=tmp_path / "out.txt"), timeout=20
    ) == [1, 1]
    for rank in range(2):
        wait_for(lambda: not _runs(int((tmp_path / f"pid{rank}").read_text())), seconds=5)  # noqa: B023


def _runs(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_alone_a_command_raises_and_exits_as_ever(capsys):
    def work(error):
        raise error

    assert run(cli.command("never.called")(lambda args: work(InputError("a wrong value")))) == 2
    assert capsys.readouterr().err == "error: a wrong value\n"
    assert run(cli.command("never.called")(lambda args: work(KeyboardInterrupt()))) == 130
    assert run(cli.command("never.called")(lambda args: sys.exit(7))) == 7
    with pytest.raises(ZeroDivisionError):
        cli.command("never.called")(lambda args: work(ZeroDivisionError()))([])


def print_to_nobody(args):
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = os.fdopen(writer, "w")
    command("cli.common.output_names")(lambda _: print("a line", flush=True))([])


def test_what_the_system_says_of_a_file_is_one_line(tmp_path, capsys):
    assert run(command("engine.logs.append_rows")(lambda _: (tmp_path, [], []))) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory\n"
    assert run(command("engine.logs.append_rows")(lambda _: (Path("/dev/full"), [], [[1]]))) == 2
    assert capsys.readouterr().err == "error: No space left on device\n"
    with pytest.raises(OSError, match="a bug"):
        command("never.called")(lambda _: (_ for _ in ()).throw(OSError("a bug")))([])


def test_a_loader_process_that_was_killed_is_one_line(monkeypatch, capsys):
    iterator = iter(DataLoader(range(9), num_workers=1))

    def die(*_):
        os.kill(iterator._workers[0].pid, signal.SIGKILL)
        time.sleep(60)

    monkeypatch.setattr(logs, "append_rows", die)
    assert run(command("engine.logs.append_rows")(lambda _: ())) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: DataLoader worker (pid ")
    assert error.count("\n") == 1


def test_where_nobody_reads_on_a_command_ends_in_silence(tmp_path):
    assert finish(launch(print_to_nobody, log=tmp_path / "log")) == [141]
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.parametrize("size", [1, 100_000])  # what fits into the buffer fails as the file is closed
def test_a_full_disk_is_one_line_whenever_it_is_noticed(size):
    with pytest.raises(FileError, match=r"full: cannot be written \(No space left on device\)"):
        write_torch(Path("/dev/full"), {"a": torch.zeros(size)})


def slow_validation(rank):
    view_scores = Classification.view_scores
    Classification.view_scores = lambda *args: time.sleep(0.5) or view_scores(*args)


def test_sigterm_in_a_validation_ends_both_ranks(args, tmp_path):
    log, last = tmp_path / "out.txt", tmp_path / "run" / "last.pt"
    both = launch(cli.train, *args, ranks=2, log=log, before=slow_validation)
    wait_for(last.exists)  # the first epoch's end, before its validation
    for process in both:
        os.kill(process.pid, signal.SIGTERM)
    assert finish(both, timeout=20) == [143, 143], log.read_text()
    assert "Traceback" not in log.read_text()
    assert checkpoint.load(last)["update"] == 3


def fail_after_sigterm(message):
    with Preemption():
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError(message)


def test_after_sigterm_a_lost_connection_is_no_failure(capsys, monkeypatch):
    with pytest.raises(RuntimeError, match="of one process"):
        fail_after_sigterm("a failure of one process")
    monkeypatch.setattr(distributed, "in_group", lambda: True)
    with pytest.raises(SystemExit) as stop:
        fail_after_sigterm("Connection closed by peer\nmore")
    assert stop.value.code == 143
    assert capsys.readouterr().err == "SIGTERM: stopped while others did: Connection closed by peer\n"


def test_torchrun_shows_the_error(args, tmp_path):
    log = tmp_path / "out.txt"
    (tmp_path / "run").write_text("a file")
    job = torchrun("--standalone", "--nproc_per_node", 2, TRAIN_NET, *args, "--data.val=null", log=log)
    assert ended([job], timeout=60) == [1]
    text = log.read_text()
    assert "no folder can be made there" in text
    assert "exitcode  : 2" in text
    assert '"message": "InputError' in text or "InputError" in text.partition("Root Cause")[2]


# ---- starts


@pytest.mark.parametrize(("patience", "seconds"), [(None, 600), (60.0, 1800)])
def test_the_groups_timeout_follows_the_videos(monkeypatch, patience, seconds):
    seen = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(
        distributed, "rendezvous", lambda *a, **o: iter([(torch.distributed.HashStore(), 0, 1)])
    )
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *a, **options: seen.update(options))
    assert distributed.start("cpu", patience) == CPU
    assert seen["timeout"].total_seconds() == seconds


def test_auto_does_not_take_an_unusable_gpu_for_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "_has_gpus", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device.pick_device() == CPU
    assert "too old for CUDA 13.2; using the CPU" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        InputError, match=r"device=auto: .*too old for CUDA 13.2; device=cpu chooses the CPU"
    ):
        device.pick_device()
    assert device.pick_device("cpu") == CPU
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(InputError, match="a build without CUDA"):
        device.pick_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.pick_device() == CPU
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["meta", "xla", "hpu"])
def test_a_device_that_cannot_compute_is_one_line(name):
    with pytest.raises(InputError, match=f"device={name}: nothing that torch can compute on here"):
        device.pick_device(name)


def test_precision(monkeypatch):
    gpu = torch.device("cuda", 0)
    for native, best in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)  # noqa: B023
        assert device.pick_precision("auto", gpu) == best
    assert device.pick_precision("auto", CPU) == "fp32"
    assert device.pick_precision("bf16", CPU) == "bf16"
    a = torch.ones(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with device.autocast(CPU, precision):
            assert (a @ a).dtype == dtype
    assert distributed.describe(CPU, "bf16") == "device: cpu, bfloat16, 1 process"


def test_set_up():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    try:
        device.set_up("high", benchmark=True)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("high", True)
        device.set_up()
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("highest", False)
    finally:
        device.set_up(before[0], benchmark=before[1])


# ---- exchange


def exchange(args):
    """A command: plain values of ranks 0, 1, 2, and their sums."""
    distributed.start("cpu")
    rank = distributed.rank()
    assert distributed.to_main([(rank, "a")] * rank) == (
        [(1, "a"), (2, "a"), (2, "a")] if rank == 0 else []
    )
    assert distributed.from_main({"from": rank}) == {"from": 0}
    values = torch.tensor([rank, 1.5, float("nan")], dtype=torch.float64)
    distributed.sums(values)
    assert values.tolist()[:2] == [3, 4.5]
    assert values[2].isnan()
    assert distributed.describe(CPU, "fp32") == "device: cpu, float32, 3 processes"
    folder = Path(args[0])
    reads = []
    read, checkpoint.read_torch = checkpoint.read_torch, lambda *a, **o: reads.append(o) or read(*a, **o)
    values, damage = checkpoint.load_last(folder)
    assert values["weights"].tolist() == [1, 2]
    assert str(damage).startswith(f"{folder}/last.pt: damaged")
    checked = {"verify": True, "mmap": False}
    assert reads == ([checked, checked] if rank == 0 else [{"verify": False, "mmap": True}])
    distributed.barrier()
    if rank == 0:
        (folder / "last-previous.pt").write_bytes(b"nothing")
    distributed.barrier()
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint to continue: .*last.pt.*previous"):
        checkpoint.load_last(folder)
    distributed.barrier()
    distributed.stop()


def test_ranks_exchange_values_and_read_the_checkpoint_that_the_first_found_sound(tmp_path):
    for _ in range(2):
        checkpoint.save_last(tmp_path, {"weights": torch.tensor([1, 2])})
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-9])
    log = tmp_path / "out.txt"
    assert finish(launch(exchange, tmp_path, ranks=3, log=log)) == [0, 0, 0], log.read_text()


def test_exchange_alone():
    assert distributed.to_main([1, 2]) == [1, 2]
    assert distributed.from_main(3) == 3


# ---- files and optimiser


def test_checkpoints_of_the_former_format_are_read(tmp_path):
    for form in ("stvit_video 2", "stvit_video 3"):
        write_torch(tmp_path / "a.pt", {"format": form, "epoch": 3})
        assert checkpoint.load(tmp_path / "a.pt")["epoch"] == 3
    write_torch(tmp_path / "a.pt", {"format": "stvit_video 1"})
    with pytest.raises(checkpoint.CheckpointError, match="it says 'stvit_video 1'"):
        checkpoint.load(tmp_path / "a.pt")


def test_unverified_reading_maps_the_file_and_changes_nothing_in_it(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"weights": torch.arange(5.0)})
    before = path.read_bytes()
    values = checkpoint.load(path, verify=False)
    assert values["weights"].tolist() == [0, 1, 2, 3, 4]
    assert str(path) in Path("/proc/self/maps").read_text()
    values["weights"] += 1
    assert path.read_bytes() == before


def test_settings_of_argparse_are_harmless(tmp_path):
    """As in MAE's and VideoMAE's files; anything else beside tensors is still refused."""
    path = tmp_path / "a.pth"
    torch.save({"model": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=0.1, decay=[1, 2])}, path)
    values = read_torch(path)
    assert values["model"]["w"].tolist() == [1, 1]
    assert vars(values["args"]) == {"lr": 0.1, "decay": [1, 2]}
    torch.save({"args": argparse.Namespace(file=Path("a"), code=os.system)}, path)
    with pytest.raises(FileError, match="could run any code: refused"):
        read_torch(path)


def test_an_optimiser_keeps_its_kernels_and_no_memory_of_the_state_it_loads():
    model = nn.Linear(2, 2)
    options = {"lr": 1.0, "betas": (0.9, 0.99), "weight_decay": 0.1, "layer_decay": None}
    optimizer = make_optimizer(model, **options)
    assert {group["fused"] for group in optimizer.param_groups} == {None}
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["fused"], group["lr"] = True, 0.5
    parallel.load_optimizer(optimizer, state)
    assert {(group["fused"], group["lr"]) for group in optimizer.param_groups} == {(None, 0.5)}
    loaded = optimizer.state_dict()["state"]
    for number, values in state["state"].items():
        for key, value in values.items():
            assert torch.equal(loaded[number][key], value)
            assert loaded[number][key].data_ptr() != value.data_ptr()


# ---- compiled and sharded models


def tiny(**sizes):
    torch.manual_seed(0)
    options = {"depth": 10, "base_depth": 4, "embed_dim": 12, "num_heads": 2, "drop_path": 0.2} | sizes
    clip = {"num_classes": 3, "num_frames": 2, "image_size": 32, "semantic_tokens": (1, 1, 2)}
    return create_model("stvit_tiny_patch16_224", **clip, **options)


def losses(called, model, updates=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values = []
    for update in range(updates):
        torch.manual_seed(update)
        loss = called(torch.randn(2, 3, 2, 32, 32)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


def counting():
    """A backend, and the graphs that it was given: without a compiler, and with eager's random numbers."""
    graphs, backend = [], torch._dynamo.lookup_backend("aot_eager")
    return graphs, lambda graph, inputs: graphs.append(graph) or backend(graph, inputs)


def assert_compiled_alone(args):
    """A command: compiled and not, the same losses; one graph, which is compiled once."""
    for checkpointing in (False, True):
        torch._dynamo.reset()
        model = tiny(depth=5, base_depth=2, checkpointing=checkpointing)
        plain, names = copy.deepcopy(model), list(model.state_dict())
        graphs, backend = counting()
        assert parallel.wrap(model, "ddp", CPU, compile=True, backend=backend) is model
        assert losses(model, model) == pytest.approx(losses(plain, plain), abs=1e-5)
        assert len(graphs) == 1
        assert list(model.state_dict()) == names
        assert plain._compiled_call_impl is None, "a copy made before is not compiled"


def assert_compiled_ranks(args):
    """A command: compiled and not, the same losses; fsdp2 compiles each of 10 blocks, once."""
    distributed.start("cpu")
    expected = None
    for kind, compiled in (("ddp", False), ("ddp", True), ("fsdp2", True)):
        torch._dynamo.reset()
        model = tiny(checkpointing=kind == "ddp")
        names = list(model.state_dict())
        graphs, backend = counting()
        called = parallel.wrap(model, kind, CPU, compile=compiled, backend=backend)
        values = losses(called, model)
        assert values == pytest.approx(expected or values, abs=1e-5), kind
        expected = values
        assert list(model.state_dict()) == names
        if kind == "fsdp2":
            assert len(graphs) == 10
    distributed.stop()


@pytest.mark.parametrize(("check", "ranks"), [(assert_compiled_alone, 1), (assert_compiled_ranks, 2)])
def test_compiled_models_train_alike(tmp_path, check, ranks):
    log = tmp_path / "out.txt"
    assert finish(launch(check, ranks=ranks, log=log)) == [0] * ranks, log.read_text()


def assert_bf16_shards(args):
    """A command: shards gathered in bfloat16, kept and summed in float32; fp16 is refused."""
    distributed.start("cpu")
    model = tiny(reducer=args[0], drop_path=0.0)
    plain = copy.deepcopy(model)
    with pytest.raises(InputError, match=r"^train.parallel=fsdp2 .*fp16"):
        parallel.wrap(plain, "fsdp2", CPU, precision="fp16")
    seen = []
    model.blocks[0].mlp.fc1.register_forward_pre_hook(lambda module, _: seen.append(module.weight.dtype))
    parallel.wrap(model, "fsdp2", CPU, precision="bf16")
    clip = torch.randn(2, 3, 2, 32, 32)
    with device.autocast(CPU, "bf16"):
        logits = model(clip).float()
    torch.testing.assert_close(logits, plain(clip), atol=0.05, rtol=0.05)
    assert seen == [torch.bfloat16]
    logits.square().mean().backward()
    assert {(p.dtype, p.grad.dtype) for p in model.parameters() if p.grad is not None} == {
        (torch.float32, torch.float32)
    }
    distributed.stop()


@pytest.mark.parametrize("reducer", ["semantic", "tome"])
def test_shards_in_bfloat16(tmp_path, reducer):
    log = tmp_path / "out.txt"
    assert finish(launch(assert_bf16_shards, reducer, ranks=2, log=log)) == [0, 0], log.read_text()


def test_names_that_are_not_utf8_are_printed_as_they_are(monkeypatch):
    def printed(args):
        print(*args)
        sys.exit(0)

    with io.TextIOWrapper(io.BytesIO(), "utf-8", "strict") as out:
        monkeypatch.setattr("sys.stdout", out)
        assert run(command("never.called")(printed), "\udcff.mp4", "é.mp4") == 0
        out.flush()
        assert out.buffer.getvalue() == b"\xff.mp4 \xc3\xa9.mp4\n"
