"""`make gpu`: what only a GPU machine can tell, in ten minutes there: tests, then speeds, on one page.

Needs torch, torchvision, timm, einops and pytest, and downloads nothing.
"""

import argparse
import gc
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from stvit_video.bench import report
from stvit_video.bench.model import measure_memory, measure_models
from stvit_video.engine.device import DTYPE_NAMES, pick_device
from stvit_video.models.zoo import create_model

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "gpu"
CLASSES = 400
LARGE = {
    "families": (
        ("vit_base_patch16_224", "stvit_base_patch16_224"),
        ("video_swin_tiny", "stvit_video_swin_tiny"),
    ),
    "precisions": ("bf16", "fp32"),
    "compiled": "bf16",  # of the first family; compiling takes most of the time
    "clip": {"num_frames": 16, "image_size": 224},
    "batches": (1, 16),
    "rounds": 5,
}
SMALL = {
    "families": (("stvit_tiny_patch16_224",),),
    "precisions": ("fp32",),
    "compiled": None,
    "clip": {"num_frames": 16, "image_size": 64},
    "batches": (1,),
    "rounds": 1,
}


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda; cpu: a rehearsal at small sizes")
    parser.add_argument("--page", default="docs/gpu.md", help="where the page goes")
    options = parser.parse_args(args)
    device = pick_device(options.device)
    page = Page(Path(options.page), options.device, machine(device))
    code = run_tests(page, options.device)
    measure(page, LARGE if device.type == "cuda" else SMALL, device)
    print(options.page)
    sys.exit(code)


class Page:
    """Markdown that stands on disk after each part: what breaks off later costs no part before it."""

    def __init__(self, path: Path, device: str, machine: str):
        self.path, self.device, self.machine = path, device, machine
        self.began, self.parts = time.perf_counter(), []

    def add(self, title: str, text: str, command: str) -> None:
        seconds = time.perf_counter() - self.began
        self.parts += ["", f"## {title}", "", f"`{command}`", "", text]
        head = [
            "# On the CPU: a rehearsal" if self.device == "cpu" else "# On a GPU",
            "",
            f"Written by `make gpu DEVICE={self.device}` in {seconds:.0f} s. Machine: {self.machine}.",
            "float32 is without TF32. A training step is the whole update of the trainer, upload included.",
        ]
        self.path.write_text("\n".join([*head, *self.parts]) + "\n")
        print(f"{seconds:4.0f} s  {title}\n{text}", flush=True)


def machine(device: torch.device) -> str:
    """One line: `report.machine`, and of CUDA the driver and libraries."""
    line = report.machine(device)
    if device.type != "cuda":
        return line
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return (
        f"{line}; {torch.cuda.device_count()} GPU, driver {driver[0] if driver else 'unknown'}, "
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    )


def run_tests(page: Page, device: str) -> int:
    """-> pytest's exit code. The page has a line for each test, and pytest's count."""
    words = ["-m", "pytest", "-rA", "--no-header", f"--device={device}", "tests/gpu"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)
    lines = re.findall(r"^(?:PASSED|FAILED|ERROR|SKIPPED).*|^\d+ \w+.* in .*", done.stdout, re.M)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    page.add("Tests", "\n".join(["```", *lines, "```"]), f"python {' '.join(words)}")
    return done.returncode


def measure(page: Page, sizes: Mapping, device: torch.device) -> None:
    """Speed and peak memory of forward passes and of the trainer's updates, a table for each setting."""
    for family in sizes["families"]:
        for precision in sizes["precisions"]:
            _add_speeds(page, sizes, family, precision, device)
    if sizes["compiled"]:
        case = sizes | {"batches": sizes["batches"][-1:]}
        _add_speeds(page, case, sizes["families"][0], sizes["compiled"], device, compiled="default")


def _add_speeds(
    page: Page,
    sizes: Mapping,
    family: Sequence[str],
    precision: str,
    device: torch.device,
    compiled: str | None = None,
) -> None:
    clip, dtype = sizes["clip"], getattr(torch, DTYPE_NAMES[precision])
    rows = measure_models(
        {name: create_model(name, num_classes=CLASSES, **clip) for name in family},
        **clip,
        batches=sizes["batches"],
        dtype=dtype,
        compiled=compiled,
        rounds=sizes["rounds"],
        device=device,
    )
    for row in rows if compiled is None else []:  # what is compiled keeps other things
        case = {"batch": row["batch"], "mode": row["mode"], "dtype": dtype, "device": device}
        row["peak MiB"] = measure_memory(row["model"], {"num_classes": CLASSES}, **clip, **case)
    gc.collect()
    command = (
        f"python tools/benchmark.py model --models {','.join(family)} "
        f"--batch {','.join(map(str, sizes['batches']))} --dtype {DTYPE_NAMES[precision]} "
        f"--num-frames {clip['num_frames']} --image-size {clip['image_size']} "
        f"--rounds {sizes['rounds']} --device {device.type}"
    )
    command += f" --compile {compiled}" if compiled else ""
    title = f"{', '.join(family)}: {DTYPE_NAMES[precision]}, {'compiled' if compiled else 'eager'}"
    page.add(title, report.markdown(rows), command)


if __name__ == "__main__":
    main()
