"""What loading must not do twice, and the benchmark that measures it."""

import dataclasses

import pytest
import torch
from PIL import Image
from test_decode import KINDS, render

from stvit_video.bench import data as bench
from stvit_video.config import Config, DataConfig, EvalConfig, resolve
from stvit_video.data import decode
from stvit_video.data.annotations import Row
from stvit_video.data.batch import collate
from stvit_video.data.decode import open_video
from stvit_video.data.transforms import TestTransform as CropTransform
from stvit_video.data.transforms import TrainTransform
from stvit_video.data.views import Sampling, TrainViews
from stvit_video.data.views import TestViews as AllViews

SAMPLING = Sampling("dense", 4, 2)
TEST = AllViews(SAMPLING, CropTransform(32, crops=3), 5)
TRAIN = TrainViews(SAMPLING, TrainTransform(32, rand_augment=(2, 5), flip=True), 2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return render(tmp_path_factory.mktemp("bench") / "a.mp4", **KINDS["b_frames.mp4"][1])


@pytest.fixture
def counted(monkeypatch):
    """How often frames are converted to RGB, and the passes over the file."""
    found = {"converted": 0, "passes": 0}
    one_pass, plain = decode.AvVideo._pass, decode.VideoReformatter

    class Reformatter:
        def reformat(self, frame, **options):
            found["converted"] += 1
            return plain().reformat(frame, **options)

    def counted_pass(self, runs):
        found["passes"] += 1
        return one_pass(self, runs)

    monkeypatch.setattr(decode, "VideoReformatter", Reformatter)
    monkeypatch.setattr(decode.AvVideo, "_pass", counted_pass)
    return found


@pytest.mark.parametrize("views", [TEST, TRAIN])
def test_one_pass_converts_the_frames_that_are_used_and_no_others(clip, counted, views):
    used = []
    with open_video(clip) as video:
        read = video.read
        video.read = lambda indices, *how: used.extend(indices) or read(indices, *how)
        clips, _ = views(video, 0)
    assert counted == {"converted": len(used), "passes": 1}
    assert len(used) == len(set(used)) < video.num_frames
    assert clips.dtype == torch.uint8
    assert clips.is_contiguous()  # so that nothing later copies it once more


def test_views_are_what_torchvision_makes_of_each_clip_alone(clip):
    with open_video(clip) as video:
        clips, _ = TEST(video, 0)
        for i in range(5):
            frames = video.read(SAMPLING.test(video, i / 4))
            alone = torch.stack(TEST.transform(frames)).transpose(1, 2)
            assert torch.equal(clips[3 * i : 3 * i + 3], alone)


def test_batches_are_the_samples(clip):
    config = small(clip)
    dataset = bench._loader(config, "train", [Row(str(clip), 0)] * 2, 0).dataset
    samples = [dataset[0, 0], dataset[0, 1]]
    assert torch.equal(collate(samples).clips, torch.stack([sample.clips for sample in samples]))


@pytest.mark.parametrize("size", [(96, 64), (64, 96)])
def test_wide_and_tall_videos_folders_and_images_give_views_of_one_size(tmp_path, size):
    path = render(tmp_path / "a.mp4", size=size)
    folder = tmp_path / "frames"
    folder.mkdir()
    with open_video(path) as video:
        frames = video.read(range(9))
    for i, frame in enumerate(frames):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(folder / f"img_{i}.png")
    with open_video(folder) as video:
        assert torch.equal(video.read(range(9)), frames)
    for source in (path, folder, folder / "img_0.png"):
        with open_video(source) as video:
            assert TEST(video, 0)[0].shape == (15, 3, 4, 32, 32)
            assert TRAIN(video, 0)[0].shape == (2, 3, 4, 32, 32)


def test_a_decode_of_every_frame_is_what_is_compared_with(clip):
    with open_video(clip) as video:
        assert bench.decode_all(clip) == video.num_frames


@pytest.mark.parametrize("where", ["worker", "device"])
def test_stages_sum_up_and_change_nothing(clip, where):
    config = small(clip)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, augment_on=where))
    for what in ("train", "test"):
        dataset = bench._loader(config, what, [Row(str(clip), 0)] * 2, 0).dataset
        before, state = dataset[3, 1].clips, torch.get_rng_state()
        times = bench.time_stages(dataset, 3, 1)
        assert list(times) == [*bench.STAGES, "all"]
        assert all(value > 0 for value in times.values())
        assert sum(times[stage] for stage in bench.STAGES) == pytest.approx(times["all"], rel=0.05)
        assert torch.equal(dataset[3, 1].clips, before)
        assert torch.equal(torch.get_rng_state(), state)


def test_the_table_and_the_picture(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "COUNTED", 1)
    rows = bench.bench_data(small(clip), videos=[clip], workers=(0, 1), rounds=2, output=tmp_path)
    assert [(row["what"], row["workers"]) for row in rows] == [
        ("train", 0), ("train", 1), ("test", 0), ("test", 1),
    ]  # fmt: skip
    columns = ["what", "workers", "samples/s", "lowest", "highest", "samples/s per core"]
    columns += [f"{stage} ms" for stage in (*bench.STAGES, "all")]
    assert all(list(row) == columns for row in rows)
    assert all(0 < row["lowest"] <= row["samples/s"] <= row["highest"] for row in rows)
    assert (tmp_path / "data.png").stat().st_size > 1000


def test_each_video_is_compared_with_its_own_decode(clip):
    rows = bench.bench_views(small(clip), videos=[clip, clip], rounds=2)
    kinds = ["full decode", "15 views", "2 training clips"]
    assert [(row["video"], row["what"]) for row in rows] == [("a.mp4", kind) for kind in 2 * kinds]
    assert all(row["ms"] > 0 and row["of a full decode"] > 0 for row in rows)
    assert rows[0]["of a full decode"] == 1


def test_feeding_is_measured_of_each_list_on_both_sides(clip, tmp_path):
    (tmp_path / "list.txt").write_text(f"{clip} 0\n")
    config = small(clip)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, timeout=30))
    rows = bench.bench_feeding(config, [str(tmp_path / "list.txt")], rounds=2, samples=2)
    assert [row["augment_on"] for row in rows] == ["worker", "device"]
    assert all(0 < row["lowest"] <= row["samples/core s"] <= row["highest"] for row in rows)
    assert rows[0]["MB"] == pytest.approx(2 * 3 * 4 * 32 * 32 / 1e6)
    assert rows[1]["device ms"] > 0


def test_the_rendered_video(tmp_path):
    with open_video(bench.render_video(tmp_path / "a.mp4")) as video:
        assert (video.num_frames, video.fps) == (300, 30)
        assert video.read([0]).shape == (1, 3, 240, 320)


def small(path, num_frames=4, stride=2, image_size=32):
    data = DataConfig(
        preset="kinetics",
        num_frames=num_frames,
        stride=stride,
        image_size=image_size,
        rand_augment=(2, 5),
        repeats=2,
    )
    config = resolve(Config(data=data, eval=EvalConfig()))
    return dataclasses.replace(config, seed=1)
