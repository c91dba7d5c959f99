"""What shared tokens and early exits save of a segmenter: multiply-adds as they are done, and images/s."""

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .. import build
from ..config import Config, resolve
from ..engine.device import autocast, pick_precision
from ..engine.evaluate import score
from ..engine.logs import progress
from ..errors import InputError
from ..models.exits import EarlyExits
from ..models.superpatches import Superpatches
from ..models.zoo import create_model
from .accuracy import setting
from .model import _timed

ADE20K_CLASSES = 150  # as ADE20K


def bench_step(
    name: str,
    *,
    image_size: int,
    head: str,
    share: float,
    leave: float,
    rounds: int,
    device: torch.device,
    **sizes,
) -> list[dict]:
    """Random weights: a plain ViT, with superpatches, and with linear and ATM exits at half depth -> a row
    each.

    share: patches over tokens; leave: share of the tokens that leave at the exit. Random weights cannot say
    which: the policy does all its work, then a fixed choice of so many takes its place.
    """
    sizes |= {"num_frames": 1, "image_size": image_size, "num_classes": ADE20K_CLASSES, "head": head}
    first = create_model(name, **sizes)
    depth = first.built["depth"]
    early = {"superpatches": "dcts", "exits": [depth // 2]}
    variants = {"plain": {}, "dCTS": {"superpatches": "dcts"}, "dCTS, linear exit": early}
    if head == "atm":
        variants["dCTS, ATM exit"] = early | {"exit_head": "atm"}
    image, calls = torch.randn(1, 3, 1, image_size, image_size, device=device), {}
    for variant, changes in variants.items():
        torch.manual_seed(0)
        model = create_model(name, **sizes, **changes)
        model.backbone.blocks = first.backbone.blocks  # shared: most of the memory
        model.to(device).eval().requires_grad_(False)
        with torch.inference_mode(), autocast(device, pick_precision("auto", device)):
            if model.backbone.superpatches is not None:
                fix_choice(model.backbone.superpatches, share)
            if model.exits is not None:
                fix_threshold(model, model.exits, image, leave)
        calls[variant] = _call(model, image)
    return measure(calls, rounds, device)


def bench_checkpoints(
    checkpoints: Sequence[str], *, limit: int, rounds: int, device: torch.device
) -> list[dict]:
    """Checkpoints of segmenters on the test list of the first -> a row each, with mIoU and tokens of all of
    its images; speed and multiply-adds are of the first `limit`.

    checkpoints: files, also with other sizes: "step.pt:superpatch_threshold=0.3:exit_threshold=1".
    """
    calls, figures, config = {}, {}, None
    for checkpoint in checkpoints:
        theirs, class_names, model = _load(checkpoint)
        config = config or theirs
        rows, _ = build.read_split(config, "test", class_names)
        model.to(device).requires_grad_(False)
        task = build.build_task(theirs, class_names).to(device)
        loader = build.build_test_loader(theirs, task, rows, device, clips=1, crops=1)
        precision = pick_precision(theirs.train.precision, device)
        outcome = score(model, task, loader, device, precision=precision, title=checkpoint)
        figures[checkpoint] = task.figures(outcome)
        loader = build.build_test_loader(theirs, task, rows[:limit], device, clips=1, crops=1)
        batches = []
        for batch in loader:
            if batch.failures:
                raise InputError(f"{batch.failures[0][1]}: to compare models, all must be readable")
            batches.append(batch.to(device))

        def run(task=task, model=model, batches=batches, precision=precision) -> int:
            with autocast(device, precision):
                for batch in batches:
                    task.records(model, batch)
            return sum(map(len, (batch.clips for batch in batches)))

        calls[checkpoint] = run
    table = []
    for row in measure(calls, rounds, device):
        of_model = figures[row["model"]]
        tokens = of_model.get("tokens", {"mean": None, "patches": None})
        first = {"model": row.pop("model"), "mIoU": of_model["mIoU"]}
        table.append(first | {"tokens": tokens["mean"], "patches": tokens["patches"]} | row)
    return table


def _load(checkpoint: str) -> tuple[Config, list[str], nn.Module]:
    """FILE:SIZE=VALUE:... -> what `build.load_model` gives, the model with these sizes."""
    path, *parts = checkpoint.split(":")
    config, class_names, model = build.load_model(path)
    if parts:
        sizes = dict(setting(part, f"--checkpoints {checkpoint}") for part in parts)
        try:
            changed = create_model(**model.built | sizes)
            changed.load_state_dict(model.state_dict())
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"--checkpoints {checkpoint}: {' '.join(str(error).split())}") from None
        model = changed.eval()
    return resolve(config), class_names, model


def measure(calls: dict[str, Callable[[], int]], rounds: int, device: torch.device) -> list[dict]:
    """What looks at images, and says at how many -> a row each; ratios are to the first. Each round has a
    turn of each, and figures are medians."""
    seconds, costs, images = {name: [] for name in calls}, {}, {}
    with progress(total=(rounds + 1) * len(calls), desc="timing", unit="call") as bar, torch.no_grad():
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                images[name] = call()
            costs[name] = counter.get_total_flops() / 2 / images[name]
            bar.update()
        for _ in range(rounds):
            for name, call in calls.items():
                seconds[name].append(_timed(call, device))
                bar.update()
    rates = {name: images[name] / statistics.median(times) for name, times in seconds.items()}
    first = next(iter(calls))
    return [
        {
            "model": name,
            "G multiply-adds": costs[name] / 1e9,
            "fewer": costs[first] / costs[name],
            "images/s": rates[name],
            "low": images[name] / max(seconds[name]),
            "high": images[name] / min(seconds[name]),
            "ratio": rates[name] / rates[first],
        }
        for name in calls
    ]


def fix_choice(superpatches: Superpatches, share: float) -> None:
    """Have it take one random choice, whatever its policy says, of patches / share tokens."""
    generator = torch.Generator().manual_seed(0)
    scores = [
        torch.rand(1, len(superpatches._members(i)), generator=generator).to(superpatches.std.device)
        for i in range(len(superpatches.shapes))
    ]
    superpatches.tokens = round(superpatches.patches / share)  # a budget, for once
    owner, decide = superpatches.choose(scores), superpatches.choose
    superpatches.tokens = None

    def choose(scores: Sequence[Tensor]) -> Tensor:
        decide(scores)
        return owner.expand(len(scores[0]), -1)

    superpatches.choose = choose


def fix_threshold(model: nn.Module, exits: EarlyExits, image: Tensor, leave: float) -> None:
    """Set the exits' threshold so that this share of the image's tokens leaves, and keep none back."""
    exits.threshold, exits.keep = 1.0, 0
    exit = model(image).exits[0]
    patch = torch.arange(exit.place.shape[1], device=image.device)[None]
    of_token = patch.new_zeros(1, int(exit.tokens)).scatter(1, exit.place, patch)  # one of its patches
    confidence = exit.scores.amax(1).gather(1, of_token)
    exits.threshold = float(confidence.quantile(1 - leave))


def _call(model: nn.Module, image: Tensor) -> Callable[[], int]:
    def run() -> int:
        with autocast(image.device, pick_precision("auto", image.device)):
            model.scores(model(image), tuple(image.shape[2:]))
        return len(image)

    return run
