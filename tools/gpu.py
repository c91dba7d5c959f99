"""`make gpu`: what only a GPU machine can tell, in ten minutes there: tests, then speeds, on one page.

Needs torch, torchvision, timm, einops and pytest, and downloads nothing.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from stvit_video.bench import report
from stvit_video.bench.model import measure_models, random_batch, time_update, trainers_update
from stvit_video.engine.device import pick_device
from stvit_video.engine.train import LoopConfig
from stvit_video.models.zoo import create_model

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "gpu"
LARGE = {
    "models": ("vit_base_patch16_224", "stvit_base_patch16_224"),
    "windows": ("video_swin_tiny", "stvit_video_swin_tiny"),
    "clip": {"num_frames": 16, "image_size": 224},
    "batches": (1, 16),
    "rounds": 5,
}
SMALL = LARGE | {
    "models": ("vit_tiny_patch16_224", "stvit_tiny_patch16_224"),
    "windows": (),
    "clip": {"num_frames": 2, "image_size": 32},
    "batches": (1,),
    "rounds": 1,
}


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda; cpu: a rehearsal at small sizes")
    parser.add_argument("--page", default="docs/gpu.md", help="where the page goes")
    options = parser.parse_args(args)
    device = pick_device(options.device)
    sizes = LARGE if device.type == "cuda" else SMALL
    began, machine = time.perf_counter(), report.machine(device)
    print(machine)
    code, tests = run_tests(options.device)
    print(tests)
    tables = {}
    for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,):
        for kind in ("models", "windows"):
            if names := sizes[kind]:
                title = f"{', '.join(names)}, {str(dtype).removeprefix('torch.')}"
                tables[title] = _speeds(names, sizes, dtype, None, device)
    if device.type == "cuda":
        tables["compiled, bfloat16"] = _speeds(
            sizes["models"], sizes | {"batches": (16,)}, torch.bfloat16, "default", device
        )
    tables["the trainer's update"] = _updates(sizes, device)
    seconds = time.perf_counter() - began
    page = _page(machine, options.device, tests, tables, seconds)
    Path(options.page).write_text(page)
    print(f"{options.page}, {seconds:.0f} s")
    sys.exit(code)


def run_tests(device: str) -> tuple[int, str]:
    """-> pytest's exit code, and its lines on each test."""
    command = [sys.executable, "-m", "pytest", "-rA", "--no-header", f"--device={device}", str(TESTS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = re.findall(r"^(?:PASSED|FAILED|ERROR|SKIPPED).*|^\d+ (?:passed|failed).*", done.stdout, re.M)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    return done.returncode, "\n".join(line.replace(f"{ROOT}/", "") for line in lines)


def _speeds(
    names: Sequence[str], sizes: Mapping, dtype: torch.dtype, compiled: str | None, device: torch.device
) -> list[dict]:
    frames = dict.fromkeys(names, sizes["clip"])
    models = {name: create_model(name, num_classes=400, **frames[name]) for name in names}
    return measure_models(
        models,
        **sizes["clip"],
        batches=sizes["batches"],
        dtype=dtype,
        compiled=compiled,
        rounds=sizes["rounds"],
        device=device,
    )


def _updates(sizes: Mapping, device: torch.device) -> list[dict]:
    """An update of the training loop, with its uploads, beside the same model on a clip that is there."""
    batch, rows = sizes["batches"][-1], []
    for name in sizes["models"]:
        for precision in ("bf16", "fp32") if device.type == "cuda" else ("fp32",):
            model = create_model(name, num_classes=400, **sizes["clip"])
            update = trainers_update(
                model, random_batch(batch, **sizes["clip"]), device, LoopConfig(precision=precision)
            )
            rows.append(
                {"model": name, "precision": precision, "batch": batch}
                | time_update(update, device, calls=10 * sizes["rounds"])
            )
    return rows


def _page(machine: str, device: str, tests: str, tables: Mapping[str, list[dict]], seconds: float) -> str:
    lines = [
        f"# On {'a GPU' if device != 'cpu' else 'the CPU: a rehearsal'}",
        "",
        f"`make gpu DEVICE={device}`, {seconds:.0f} s, written by that command. {machine}.",
        "",
        "## Tests",
        "",
        "```",
        tests,
        "```",
    ]
    for title, rows in tables.items():
        lines += ["", f"## Speed: {title}", "", report.markdown(rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
