"""What the command train does; and how a run begins, which scoring shares."""

import contextlib
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import torch
import yaml

from .. import build
from ..config import Config, settle_pixels
from ..engine import checkpoint as checkpoints
from ..engine import distributed
from ..engine.device import pick_precision, set_up
from ..engine.job import Job, Task
from ..engine.train import fit
from ..files import alone, written_whole
from ..models.zoo import changed_sizes, multiply_adds
from ..resume import check_resume, discard_run, find_run, model_of_run
from ..tasks import TASKS
from ..weights import LoadReport, pixels_of_toolbox
from .common import make_folder

LOCK = "training.lock"


def start(config: Config) -> torch.device:
    """Join the other processes, if any; -> this one's device, set up."""
    device = distributed.start(config.device, config.data.timeout)
    if device.type == "cuda":
        set_up(config.train.matmul, benchmark=config.model.name.startswith("ptv_"))
    return device


def introduce(
    config: Config,
    model: torch.nn.Module,
    task: Task,
    device: torch.device,
    weights: LoadReport | None,
) -> None:
    """What computes, what is computed, and where its weights come from."""
    print(distributed.describe(device, pick_precision(config.train.precision, device)))
    backbone = getattr(model, "backbone", model)  # what a head costs depends on what it finds
    cost = multiply_adds(backbone, num_frames=config.data.num_frames, image_size=config.data.image_size)
    parameters = sum(p.numel() for p in model.parameters())
    of_what, side = "" if backbone is model else "of the backbone ", config.data.image_size
    changed = ", ".join(f"{key}={value}" for key, value in changed_sizes(model).items())
    learnt = f"{task.outputs} classes" if getattr(task, "labelled", True) else "no labels"
    name = f"{model.built['name']} with {changed}" if changed else model.built["name"]
    print(
        f"{name}: {parameters / 1e6:.2f} M parameters, {cost / 1e9:.3g} G multiply-adds "
        f"{of_what}a view of {config.data.num_frames}x{side}x{side}, {learnt}"
    )
    if weights is not None:
        print(weights)
        weights.write(Path(config.output, "weights.json"))


def train(config: Config, flags: Namespace) -> None:
    """A run, from its settings to its checkpoints."""
    device = start(config)
    output = Path(config.output)
    with contextlib.ExitStack() as held:
        _train(config, flags, output, device, held)


def _claim(output: Path) -> contextlib.AbstractContextManager:
    """Two runs in one folder would replace each other's checkpoints. Raises FileError where one trains."""
    make_folder(output)
    if not distributed.is_main():
        return contextlib.nullcontext()
    return alone(output / LOCK, f"output={output}: another process trains there")


def _train(
    config: Config, flags: Namespace, output: Path, device: torch.device, held: contextlib.ExitStack
) -> None:
    there = output.exists()
    if there:  # before its checkpoint is read; a run that is refused makes no folder
        held.enter_context(_claim(output))
    last = output / checkpoints.LAST
    state, damage = find_run(output, resume=flags.resume, overwrite=flags.overwrite)

    if state is not None:
        config = model_of_run(settle_pixels(config, pixels_of_toolbox(state)), state)
    job, weights = build.build_job(config, device, pretrained=state is None)
    if state is not None:
        check_resume(state, config, job, last)
    if not there:
        held.enter_context(_claim(output))
    if distributed.is_main():
        if state is None:
            discard_run(output)
        with written_whole(output / "config.yaml") as part:  # it may be the only copy of what was asked for
            part.write_text(yaml.safe_dump(job.details["config"], sort_keys=False))
        introduce(config, job.model, job.task, device, weights)
        print(_plan(job, config))
    distributed.barrier()  # every rank has read its checkpoint
    if distributed.is_main():
        checkpoints.tidy(output, last_is_damaged=damage is not None)
    best = fit(job, config.train, output=output, seed=config.seed, resume=state)
    if distributed.is_main():
        print(f"checkpoints: {' and '.join(dict.fromkeys(map(str, (best, last))))}")
        print(f"curves:      {output / 'curves.png'}")
        print(_next_steps(job, config, output, best))


def _plan(job: Job, config: Config) -> str:
    """What is about to happen, in a line; and one more, where it will hardly learn."""
    loader, train, names = job.train_loader, config.train, job.task.class_names
    classes = f" of {len(names)} classes ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    classes = classes if getattr(job.task, "labelled", True) else ""
    clips = len(loader) * train.batch_size * config.data.repeats * distributed.world()
    validation = "" if job.val_loader is None else f"; validating on {len(job.val_loader.dataset)}"
    plan = (
        f"training on {len(loader.dataset)} {job.task.items}{classes}: {train.epochs} epochs "
        f"of {clips} clips, {train.epochs * (len(loader) // train.accumulate)} updates{validation}"
    )
    if config.model.weights is None and (train.layer_decay or 1) < 1:
        plan += (
            f"\ntrain.layer_decay={train.layer_decay} is for pretrained weights, and there is no "
            "model.weights: the first layers will hardly learn. From scratch: --train.layer_decay null"
        )
    return plan


def _next_steps(job: Job, config: Config, output: Path, best: Path) -> str:
    """Commands that go on from here, spelled as this one was started."""
    tools = Path(sys.argv[0]).name == "train_net.py"
    test, predict, page = (
        f"python tools/{tool}.py" if tools else f"stvit-{name}"
        for tool, name in (("test_net", "test"), ("predict", "predict"), ("open_page", "page"))
    )
    best, settings = shlex.quote(str(best)), shlex.quote(str(output / "config.yaml"))
    inputs = "IMAGE..." if config.data.num_frames == 1 else "VIDEO..."
    lines = [f"recognise:   {predict} --checkpoint {best} {inputs}"]
    if not TASKS[config.task].has_head:  # the page shows scores of classes
        lines.append(f"look:        {page} --checkpoint {best}")
    if job.val_loader is not None:
        lines.insert(0, f"score:       {test} --cfg {settings} --checkpoint {best}")
    return "\n".join(lines)
