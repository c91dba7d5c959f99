"""What must hold on a GPU as on the CPU. `make gpu` runs it there; with --device=cpu it is a rehearsal.

Needs torch, torchvision, timm, einops and pytest only.
"""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from stvit_video.bench.model import random_batch
from stvit_video.data.augment import OPERATIONS, Draw, argument, cut, finish
from stvit_video.data.batch import Batch
from stvit_video.data.transforms import Normalise
from stvit_video.engine.job import Job
from stvit_video.engine.train import LoopConfig, start_run
from stvit_video.engine.uploads import Uploads
from stvit_video.models.zoo import create_model
from stvit_video.tasks import ClassificationSettings
from stvit_video.tasks.classification import Classification

CPU = torch.device("cpu")
CLIP = {"num_classes": 5, "num_frames": 4, "image_size": 32}
VIT = {"embed_dim": 48, "depth": 5, "num_heads": 3, "patch_size": (2, 8, 8)}
FEW = {"base_depth": 1, "semantic_tokens": (2, 2, 2)}
SWIN = {"embed_dim": 12, "depths": [2, 2, 6, 2], "num_heads": [1, 2, 2, 4], "window_size": (2, 2, 2),
        "patch_size": (2, 4, 4)}  # fmt: skip
MODELS = {
    "vit_tiny_patch16_224": VIT,
    "stvit_tiny_patch16_224": VIT | FEW,
    "pool_vit_tiny_patch16_224": VIT | FEW,
    "random_vit_tiny_patch16_224": VIT | FEW,
    "tome_vit_tiny_patch16_224": VIT | FEW,
    "video_swin_tiny": SWIN,
    "stvit_video_swin_tiny": SWIN | {"base_depth": 2, "semantic_tokens": (2, 1, 1)},
    "stvit_r_video_swin_small": SWIN | {"semantic_tokens": (2, 1, 1)},
}
RECIPE = ClassificationSettings(label_smoothing=0.1, erasing=0.5, mixup=0.8, cutmix=1.0)


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _exact():
    """No TF32: what differs between devices is rounding alone."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def make_model(name):
    torch.manual_seed(0)
    return create_model(name, **CLIP, **MODELS[name])


def make_batch(seed=0):
    torch.manual_seed(seed)
    batch = random_batch(3, 4, 32, repeats=2)
    batch.targets = torch.randint(5, (3, 2))
    return batch


def start(model, device, settings=None, **config):
    normalise = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    task = Classification("abcde", normalise=normalise, settings=settings).to(device)
    config = LoopConfig(**{"precision": "fp32", "lr": 1e-3, "warmup_epochs": 0, "clip_grad": 1.0} | config)
    job = Job(task, model.to(device), device, None, None, {})
    return task, start_run(job, config, updates_an_epoch=100)


def train(model, device, updates=3, settings=None, **config):
    """-> losses of so many updates, and the run."""
    task, run = start(copy.deepcopy(model), device, settings, **config)
    run.model.train()
    losses = []
    for i in range(updates):
        update = run.make_update(task, Uploads([make_batch(i)], device), 1, seed=0)
        losses.append(update.losses["loss"])
    return losses, run


@pytest.mark.parametrize("name", MODELS)
def test_forward_passes_agree_with_the_cpu(name, device):
    model = make_model(name).eval()
    clips = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        expected = model(clips)
        logits = copy.deepcopy(model).to(device)(clips.to(device)).cpu()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("random")])
def test_updates_agree_with_the_cpu(name, device):
    """Losses of three updates within 1e-3; random patches are drawn on the device, and are others there."""
    model = make_model(name)
    expected, _ = train(model, CPU)
    losses, _ = train(model, device)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert expected[0] != expected[-1]


def test_a_whole_recipe_agrees_with_the_cpu(device):
    """Erasing, mixup and cutmix are drawn on the CPU and so alike; averages follow."""
    model = make_model("stvit_tiny_patch16_224")
    (expected, cpu), (losses, run) = (
        train(model, d, settings=RECIPE, ema=0.9, layer_decay=0.8) for d in (CPU, device)
    )
    assert losses == pytest.approx(expected, rel=1e-3)
    for a, b in zip(cpu.ema.module.parameters(), run.ema.module.parameters(), strict=True):
        torch.testing.assert_close(b.cpu(), a, atol=2e-3, rtol=1e-2)


def test_bfloat16_is_near_float32(device):
    model = make_model("stvit_tiny_patch16_224")
    (exact, _), (losses, run) = (train(model, device, precision=p) for p in ("fp32", "bf16"))
    assert losses == pytest.approx(exact, rel=0.03)
    assert losses != exact
    assert all(p.dtype == torch.float32 for p in run.bare.parameters())


def test_float16_scales_its_loss_and_skips_what_overflows(device):
    model = make_model("vit_tiny_patch16_224")
    exact, _ = train(model, device)
    task, run = start(model, device, precision="fp16")
    run.model.train()
    run.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**24)  # overflows, at first
    before, skipped = [p.clone() for p in run.bare.parameters()], []
    for i in range(20):
        skipped.append(run.make_update(task, Uploads([make_batch(i)], device), 1, seed=0).skipped)
        if skipped == [True]:
            assert all(map(torch.equal, before, run.bare.parameters()))
    assert skipped[0]
    assert not skipped[-1]
    assert run.scaler.get_scale() < 2.0**24
    assert sum(skipped) < 13
    losses, _ = train(make_model("vit_tiny_patch16_224"), device, precision="fp16")
    assert losses == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("name", ["stvit_tiny_patch16_224", "tome_vit_tiny_patch16_224",
                                  "stvit_video_swin_tiny"])  # fmt: skip
def test_what_is_compiled_is_compiled_once_and_computes_the_same(name, device):
    if device.type != "cuda":
        pytest.skip("takes minutes on the CPU, where test_process.py counts graphs")
    model = make_model(name)
    expected, _ = train(model, device, updates=4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses, run = train(model, device, updates=4, compile=True)
    assert losses == pytest.approx(expected, rel=2e-3)
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] == 1, "one graph: no break and no recompilation"
    assert not any(name.startswith("_orig_mod") for name in run.bare.state_dict())


def test_batches_arrive_as_they_were_made(device):
    batches = [make_batch(i) for i in range(5)]
    if device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
        assert all(batch.clips.is_pinned() and batch.targets.is_pinned() for batch in batches)
    uploads = Uploads(copy.copy(batches), device)
    for number, batch in enumerate(uploads):
        uploads.prefetch()
        assert batch.clips.device.type == device.type
        assert torch.equal(batch.clips.cpu(), make_batch(number).clips)
        assert torch.equal(batch.targets.cpu(), make_batch(number).targets)
    assert number == 4


def cut_batch(operation=None, size=32):
    """Of 3 videos two clips each, still to be augmented; without an operation they are resized and flipped.

    Else each goes through it with a magnitude of its own, and is not resized: that is rounded, too.
    """
    torch.manual_seed(0)
    draws, cuts = [], []
    for i in range(6):
        operations, box = (), (i, 0, 20 + 8 * i, 90 - 9 * i)
        if operation:
            box = (i, 2 * i, size, size)
            operations = ((operation, argument(operation, 2 * i, (-1) ** i, (100, 100))),)
        draws.append(Draw(box, size, (100, 100), operations, flip=i % 3 == 0))
        frames = torch.randint(256, (4, 3, 12, 12), dtype=torch.uint8)
        frames = torch.nn.functional.interpolate(frames.float(), (100, 100), mode="bilinear").to(
            torch.uint8
        )
        cuts.append(cut(frames, draws[-1]).movedim(1, -1).flatten())
    pairs = [draws[i : i + 2] for i in (0, 2, 4)]
    return Batch(torch.arange(3), torch.cat(cuts), torch.zeros(3, 2, dtype=torch.long), draws=pairs)


ROUNDED = {None, "ShearX", "ShearY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness"}


@pytest.mark.parametrize("operation", [None, *OPERATIONS])
def test_pixels_are_changed_on_the_device_as_on_the_cpu(device, operation):
    """To a level where float32 is rounded, else exactly; and no device is waited for."""
    expected = finish(cut_batch(operation)).clips
    batch = cut_batch(operation)
    if device.type == "cuda":
        list(Uploads([cut_batch(operation)], device))  # the first allocates, and loads kernels
        torch.cuda.set_sync_debug_mode("error")
        batch = batch.pin_memory()
    try:
        (batch,) = Uploads([batch], device)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    clips = batch.clips.cpu()
    assert clips.shape == expected.shape == (3, 2, 3, 4, 32, 32)
    far = (clips.int() - expected.int()).abs()
    assert far.max() <= (operation in ROUNDED)


@pytest.mark.parametrize("settings", [None, RECIPE], ids=["plain", "recipe"])
def test_an_update_waits_for_the_device_once(device, settings):
    if device.type != "cuda":
        pytest.skip("counted by CUDA; on the CPU by test_loop.py")
    batches = [make_batch(i).pin_memory() for i in range(4)]
    task, run = start(make_model("stvit_tiny_patch16_224"), device, settings, ema=0.9)
    run.model.train()
    uploads = Uploads(batches, device)
    for _ in range(2):  # the first allocate, and compile kernels
        run.make_update(task, uploads, 1, seed=0, prefetch=uploads.prefetch)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waited:
            warnings.simplefilter("always")
            run.make_update(task, uploads, 1, seed=0, prefetch=uploads.prefetch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waited = [w for w in waited if "synchroniz" in str(w.message)]
    assert len(waited) == 1, [f"{w.filename}:{w.lineno}" for w in waited]


def test_what_is_not_finite_is_skipped_on_the_device(device):
    task, run = start(make_model("vit_tiny_patch16_224"), device, ema=0.9)
    run.model.train()
    before = [p.clone() for p in run.bare.parameters()]
    with torch.no_grad():
        run.bare.head.bias[0] = torch.nan
    broken = [p.clone() for p in run.bare.parameters()]
    assert run.make_update(task, Uploads([make_batch()], device), 1, seed=0).skipped
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in
               zip(broken, run.bare.parameters(), strict=True))  # fmt: skip
    assert all(map(torch.equal, before, run.ema.module.parameters()))


def test_shifted_windows_are_the_same_on_both_devices(device):
    model = make_model("video_swin_tiny").eval()
    clips = torch.randn(1, 3, 6, 44, 52)  # padded and shifted windows
    with torch.no_grad():
        expected = model(clips)
        torch.testing.assert_close(
            copy.deepcopy(model).to(device)(clips.to(device)).cpu(), expected, atol=1e-4, rtol=1e-4
        )


def ranks_on(device):
    """Where two ranks run: on two GPUs by NCCL, else on the CPU by gloo."""
    return "cuda" if device.type == "cuda" and torch.cuda.device_count() > 1 else "cpu"


def torchrun(*words, timeout=180):
    """-> exit code, output."""
    script = Path(__file__).with_name("two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, str(script), *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PYTHONPATH": paths},
    )
    return done.returncode, done.stdout + done.stderr


def test_two_ranks_train_like_one(device):
    code, text = torchrun(ranks_on(device), "ddp", "fsdp2")
    assert code == 0, text
    batches = [make_batch(i) for i in range(3)]
    task, run = start(make_model("vit_tiny_patch16_224"), CPU)
    run.model.train()
    expected = []
    for i in range(3):
        other = make_batch(i + 10)
        both = [torch.cat([getattr(batches[i], k), getattr(other, k)]) for k in ("clips", "targets")]
        update = run.make_update(task, iter([Batch(torch.arange(6), *both)]), 1, seed=0)
        expected.append(update.losses["loss"])
    for parallel in ("ddp", "fsdp2"):
        losses = [float(word) for word in text.split(f"{parallel} losses:")[1].split()[:3]]
        assert losses == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("end", ["raise", "kill"])
def test_a_rank_that_ends_ends_the_job(device, end):
    if ranks_on(device) == "cpu":
        pytest.skip("takes two GPUs; on the CPU by test_process.py and test_ranks.py")
    code, text = torchrun("cuda", "ddp", end)
    assert code != 0
    assert ("injected into rank 1" if end == "raise" else "SIGKILL") in text
