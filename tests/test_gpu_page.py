"""`make gpu`, rehearsed on the CPU: tests/gpu and small tables, without what a GPU machine may lack."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Nothing can be installed on such a machine: beside torch, torchvision, timm, einops and pytest, and what
# they bring, nothing may be asked for.
ABSENT = (
    *("av", "braceexpand", "decord", "fvcore", "jsonargparse", "matplotlib", "pytorchvideo", "sklearn"),
    *("pycocotools", "tensorboard", "webdataset"),
)
IMPORTS = """
import importlib, sys, traceback

sys.modules |= dict.fromkeys(sys.argv[1:])
for name in ("bench.model", "engine.train", "tasks", "models.zoo"):
    try:
        importlib.import_module(f"stvit_video.{name}")
    except ImportError as error:
        last = [f for f in traceback.extract_tb(error.__traceback__) if "stvit_video" in f.filename][-1]
        print(f"{name}: {last.filename}:{last.lineno}: {last.line}")
"""


def test_what_a_gpu_machine_computes_with_needs_nothing_more():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *ABSENT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""


def test_the_page_is_written_without_what_a_gpu_machine_may_lack(tmp_path):
    absent, page = tmp_path / "absent", tmp_path / "gpu.md"
    absent.mkdir()
    for name in ABSENT:  # found first, in pytest's and torchrun's processes too
        (absent / f"{name}.py").write_text(f"raise ImportError('{name} is absent here')")
    paths = os.pathsep.join(map(str, (absent, ROOT)))
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "gpu.py", "--device", "cpu", "--page", page],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = page.read_text()
    assert "Machine: " in text.splitlines()[2]
    assert "PASSED tests/gpu/test_gpu.py::test_two_ranks_train_like_one" in text
    assert " passed, " in text
    assert "| model | mode | batch | clips/s |" in text
    for mode in ("forward", "training"):
        assert f"| stvit_tiny_patch16_224 | {mode} | 1 | " in text
