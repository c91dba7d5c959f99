import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from stvit_video.data import demo
from stvit_video.data.annotations import mirrored_classes, read_rows
from stvit_video.data.decode import open_video
from stvit_video.errors import InputError


def test_rows_and_classes(demo_root):
    rows = read_rows(demo_root / "train")
    assert rows.class_names == list(demo.CLASSES)
    assert len(rows) == 24
    assert {row.label for row in rows} == set(range(8))
    twins = [demo.CLASSES[i] for i in mirrored_classes(demo.CLASSES)]
    assert twins == ["grow", "move_down", "move_right", "move_left", "move_up", "shrink",
                     "turn_right", "turn_left"]  # fmt: skip


def test_rendered_once_and_reproducibly(demo_root, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SETTINGS", demo.SETTINGS | {"train": 24, "test": 11})
    clip = next((demo_root / "train").glob("*/*.mp4"))
    written = clip.stat().st_mtime_ns
    demo.prepare_demo(demo_root)
    assert clip.stat().st_mtime_ns == written

    name, (index, shape) = clip.parent.name, clip.stem.split("_")
    rng = np.random.default_rng((demo.SETTINGS["seed"], 0, int(index)))
    assert demo.SHAPES[rng.integers(len(demo.SHAPES))] == shape
    again = tmp_path / "again.mp4"
    demo.write_mp4(again, demo.render(name, shape, rng))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (clip, again)]
    assert digests[0] == digests[1]


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc fills memory on demand")
def test_bytes_do_not_depend_on_what_memory_held_before(tmp_path):
    script = """
import sys
import numpy as np
from stvit_video.data import demo
for i in range(8):
    frames = demo.render(demo.CLASSES[i], "star", np.random.default_rng((0, 0, i)))
    demo.write_mp4(f"{sys.argv[1]}_{i}.mp4", frames)
"""
    for fill in ("1", "165"):
        environment = os.environ | {"MALLOC_PERTURB_": fill}
        command = [sys.executable, "-c", script, str(tmp_path / fill)]
        subprocess.run(command, env=environment, check=True)
    for i in range(8):
        first, second = ((tmp_path / f"{fill}_{i}.mp4").read_bytes() for fill in ("1", "165"))
        assert first == second


def test_a_folder_of_others_is_never_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not replaced"):
        demo.prepare_demo(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("kind", ["move", "turn", "size"])
def test_opposite_classes_are_each_other_backwards(kind, monkeypatch):
    """The same state at t = 0, read backwards in time: the frames of the opposite class."""
    names = {"move": ("move_left", "move_right"), "turn": ("turn_left", "turn_right"),
             "size": ("grow", "shrink")}[kind]  # fmt: skip
    first, second = (demo.render(name, "star", np.random.default_rng(3)) for name in names)
    assert np.array_equal(first[0], second[0])
    assert not np.array_equal(first[1], second[1])


def test_one_frame_says_nothing_of_the_class():
    """Mean frame and size of what stands out are alike in all classes, at every time."""
    means = torch.zeros(len(demo.CLASSES), 3)
    for c, name in enumerate(demo.CLASSES):
        for i in range(60):
            frames = demo.render(name, "disc", np.random.default_rng((i, c)))
            for k, at in enumerate((0, len(frames) // 2, -1)):
                means[c, k] += frames[at].std() / 60
    assert (means.amax(0) - means.amin(0)).max() < 0.25 * means.mean()


@pytest.mark.parametrize("decoder", ["av", "decord"])
def test_the_mp4_holds_what_was_rendered(decoder, tmp_path):
    frames = demo.render("turn_left", "star", np.random.default_rng(5))
    demo.write_mp4(tmp_path / "clip.mp4", frames)
    with open_video(tmp_path / "clip.mp4", decoder) as video:
        assert (video.num_frames, video.fps) == (len(frames), demo.FPS)
        read = video.read(range(len(frames))).permute(0, 2, 3, 1).numpy()
    error = np.abs(read.astype(int) - frames)
    assert error.mean() < 8  # colours at half resolution
    other = np.abs(read[1:].astype(int) - frames[:-1]).mean((1, 2, 3))
    assert (error[1:].mean((1, 2, 3)) < other).all()  # each frame is nearest to its own


def test_av_and_decord_agree_on_the_demo_set(demo_root):
    for path in sorted(demo_root.glob("*/*/*.mp4")):
        with open_video(path) as one, open_video(path, "decord") as two:
            assert one.num_frames == two.num_frames
            order = [5, 0, one.num_frames - 1, 5, 3]
            gap = (one.read(order).int() - two.read(order).int()).abs().float()
            assert gap.mean((1, 2, 3)).max() <= 2
