import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other

import pytest
import torch

collect_ignore = ["gpu"]  # test_gpu_page.py runs it; by its name, pytest runs it too


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="what tests/gpu runs on: cuda; cpu: a rehearsal")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory):
    """A small rendering of the demo set: {train,test}/<class>/*.mp4."""
    from stvit_video.data import demo

    root = tmp_path_factory.mktemp("data") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SETTINGS", demo.SETTINGS | {"train": 24, "test": 11})
        demo.prepare_demo(root, workers=1)
        yield root
