import errno
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from stvit_video.data import dataset, demo, views
from stvit_video.data.annotations import Row, Rows
from stvit_video.data.batch import Sample, collate
from stvit_video.data.dataset import TestSampler as EverySampler
from stvit_video.data.dataset import TrainSampler, VideoDataset, make_loader
from stvit_video.data.guard import Guard
from stvit_video.data.transforms import Mix, Normalise, TrainTransform
from stvit_video.data.transforms import TestTransform as CropTransform
from stvit_video.engine.uploads import Uploads
from stvit_video.errors import InputError

Sampling = views.Sampling
ROOT = Path(__file__).parents[1]


class Counter:
    """A video whose frame i is filled with i, and which counts what is read."""

    fps = 30.0

    def __init__(self, num_frames, height=20, width=30):
        self.num_frames, self.size, self.reads = num_frames, (height, width), []

    def read(self, indices, short_side=None):
        self.reads.append(list(indices))
        self.short_side = short_side
        frames = torch.tensor(indices, dtype=torch.uint8).view(-1, 1, 1, 1)
        return frames.expand(-1, 3, *self.size).contiguous()


def test_test_views_are_clips_times_crops_of_one_decode():
    video = Counter(40)
    make = views.TestViews(Sampling("dense", 4, 3), CropTransform(20, crops=3), clips=2)
    clips, targets = make(video, 7)
    assert clips.shape == (6, 3, 4, 20, 20)
    assert clips.dtype == torch.uint8
    assert targets == [7] * 6
    first, last = [0, 3, 6, 9], [30, 33, 36, 39]
    assert clips[:, 0, :, 0, 0].tolist() == [first] * 3 + [last] * 3
    assert video.reads == [first + last]


def test_overlapping_clips_read_each_frame_once():
    video = Counter(10)
    views.TestViews(Sampling("dense", 4, 2), CropTransform(20), clips=5)(video, 0)
    assert video.reads == [list(range(10))]


def test_crops_lie_left_centre_right_or_top_centre_bottom():
    wide = torch.arange(30, dtype=torch.uint8).expand(1, 3, 20, 30)
    columns = [crop[0, 0, 0, 0].item() for crop in CropTransform(20, crops=3)(wide)]
    assert columns == [0, 5, 10]
    rows = [crop[0, 0, 0, 0].item() for crop in CropTransform(20, crops=3)(wide.mT)]
    assert rows == [0, 5, 10]
    assert [crop[0, 0, 0, 0].item() for crop in CropTransform(20)(wide)] == [5]


def test_crop_ratio():
    frame = torch.zeros(1, 3, 256, 340, dtype=torch.uint8)
    assert CropTransform(224, crop_ratio=0.875).resize(frame).shape == (1, 3, 256, 340)
    assert CropTransform(224).resize(frame).shape == (1, 3, 224, 297)


def test_target_fps_changes_the_stride():
    video = Counter(200)
    video.fps = 15.0
    assert Sampling("dense", 4, 4, target_fps=30).test(video, 0) == [0, 2, 4, 6]
    video.fps = 0.0
    assert Sampling("dense", 4, 4, target_fps=30).test(video, 0) == [0, 4, 8, 12]


def test_middle_is_the_middle_frame_in_training_too():
    assert {Sampling("middle", 1).train(Counter(41))[0] for _ in range(10)} == {20}


def test_training_clips_of_one_video_differ_and_are_read_once():
    video = Counter(200)
    transform = TrainTransform(16, scale=(0.5, 1.0))
    clips, targets = views.TrainViews(Sampling("dense", 4, 2), transform, 3)(video, 1)
    assert clips.shape == (3, 3, 4, 16, 16)
    assert targets == [1, 1, 1]
    starts = clips[:, 0, 0, 0, 0].tolist()
    assert len(set(starts)) == 3
    assert len(video.reads) == 1
    assert clips[:, 0, :, 5, 5].diff(dim=1).tolist() == [[2, 2, 2]] * 3


@pytest.mark.parametrize(
    ("flip", "mirror", "mirrored_label"),
    [(True, None, 0), (True, [1, 0, 2].__getitem__, 1), (False, None, None)],
)
def test_flip(flip, mirror, mirrored_label):
    ramp = torch.arange(16, dtype=torch.uint8).expand(2, 3, 16, 16)
    transform = TrainTransform(16, scale=(1, 1), ratio=(1, 1), flip=flip, mirror=mirror)
    seen = set()
    for _ in range(40):
        clip, label = transform(ramp, 0)
        assert torch.equal(clip, ramp) or torch.equal(clip, ramp.flip(-1))
        seen.add((not torch.equal(clip, ramp), label))
    assert seen == ({(False, 0)} if mirrored_label is None else {(False, 0), (True, mirrored_label)})


def test_what_is_augmented_is_mirrored_too():
    frames = torch.randint(256, (2, 3, 24, 24), dtype=torch.uint8)
    plain, flipped = (TrainTransform(16, rand_augment=(2, 7), flip=flip) for flip in (False, True))
    seen = set()
    for seed in range(12):
        clips = [torch.manual_seed(seed) and transform(frames, 0)[0] for transform in (plain, flipped)]
        assert torch.equal(clips[1], clips[0]) or torch.equal(clips[1], clips[0].flip(-1))
        seen.add(torch.equal(*clips))
    assert seen == {True, False}


def test_boxes_and_masks_move_with_the_pixels():
    """The box and the mask of a white rectangle are still those of it, wherever crop and flip put it."""
    frames = torch.zeros(2, 3, 40, 48, dtype=torch.uint8)
    frames[..., 12:28, 10:30] = 255
    box = tv_tensors.BoundingBoxes([[10, 12, 30, 28]], format="XYXY", canvas_size=(40, 48))
    target = {"boxes": box, "mask": tv_tensors.Mask(frames[0, :1] // 255), "ids": (3, 1), "text": "white"}
    transform = TrainTransform(32, scale=(0.9, 1), flip=True, mirror=lambda t: t | {"text": "mirrored"})
    texts = set()
    for _ in range(10):
        clip, moved = transform(frames, target)
        mask = moved["mask"][0]
        assert type(moved["mask"]) is tv_tensors.Mask
        assert (mask != clip[0, 0] // 128).sum() <= 0.3 * mask.sum()  # a pixel around it
        x, y = mask.any(0).nonzero().flatten(), mask.any(1).nonzero().flatten()
        edges = torch.stack([x[0], y[0], x[-1] + 1, y[-1] + 1])
        assert (moved["boxes"][0] - edges).abs().max() <= 1
        assert moved["boxes"].canvas_size == (32, 32)
        assert moved["ids"] == (3, 1)
        texts.add(moved["text"])
    assert texts == {"white", "mirrored"}
    assert target["text"] == "white"


def test_randaugment_does_not_take_boxes():
    box = tv_tensors.BoundingBoxes([[0, 0, 5, 5]], format="XYXY", canvas_size=(16, 16))
    transform = TrainTransform(16, rand_augment=(1, 5))
    with pytest.raises(InputError, match=r"data.rand_augment: .* BoundingBoxes"):
        transform(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), {"where": [box]})


def sample(index, *targets, shape=(3, 2, 4, 4)):
    clips = torch.full((len(targets), *shape), index, dtype=torch.uint8)
    return Sample(index, clips, list(targets), [])


def boxes(*rows):
    return tv_tensors.BoundingBoxes(list(rows), format="XYXY", canvas_size=(4, 4))


def test_targets_that_are_alike_are_stacked():
    failed = Sample(9, None, [], [("x.mp4", "gone")])
    batch = collate([sample(4, 1, 2), failed, sample(7, 3, 4)])
    assert (batch.indices.tolist(), batch.failed, batch.failures) == ([4, 7], [9], [("x.mp4", "gone")])
    assert batch.clips.shape == (2, 2, 3, 2, 4, 4)
    assert batch.clips[:, 0, 0, 0, 0, 0].tolist() == [4, 7]
    assert (batch.targets.tolist(), batch.targets.dtype) == ([[1, 2], [3, 4]], torch.long)
    assert collate([failed]).clips is collate([failed]).targets is None
    targets = [
        {"id": i, "flow": torch.full((3,), i), "mask": tv_tensors.Mask(torch.zeros(2, 2))} for i in range(4)
    ]
    batch = collate([sample(0, *targets[:2]), sample(1, *targets[2:])])
    assert batch.targets["id"].tolist() == [[0, 1], [2, 3]]
    assert batch.targets["flow"][1, 0].tolist() == [2, 2, 2]
    assert (batch.targets["mask"].shape, type(batch.targets["mask"])) == ((2, 2, 2, 2), tv_tensors.Mask)


def test_targets_that_differ_are_listed_and_keep_their_meaning():
    assert collate([sample(0, (1,), (2,)), sample(1, (), (3, 4))]).targets == [[(1,), (2,)], [(), (3, 4)]]
    one, two = boxes([0, 0, 1, 1]), boxes([0, 0, 1, 1], [1, 1, 2, 2])
    batch = collate([sample(0, {"boxes": one, "id": 5}), sample(1, {"boxes": two, "id": 6})])
    assert batch.targets["id"].tolist() == [[5], [6]]
    for moved in (batch, batch.to("cpu"), batch.to("meta")):
        [[first], [second]] = moved.targets["boxes"]
        assert type(first) is type(second) is tv_tensors.BoundingBoxes
        assert (second.canvas_size, second.shape, first.format) == ((4, 4), (2, 4), one.format)
    assert moved.clips.device.type == second.device.type == moved.targets["id"].device.type == "meta"


def test_clips_of_other_shapes_are_listed():
    batch = collate([sample(0, 1), sample(1, 2, shape=(3, 2, 6, 4))])
    assert [clip.shape for clip in batch.clips] == [(1, 3, 2, 4, 4), (1, 3, 2, 6, 4)]
    assert batch.targets.tolist() == [[1], [2]]


@pytest.mark.parametrize(("workers", "timeout"), [(0, None), (1, None), (1, 30)])
def test_any_target_comes_through_workers_and_guard(demo_root, workers, timeout):
    path = str(next(demo_root.glob("train/*/*.mp4")))
    target = {
        "boxes": tv_tensors.BoundingBoxes([[8, 8, 40, 40]], format="XYXY", canvas_size=(48, 64)),
        "ids": (1, 2),
    }
    make = views.TrainViews(Sampling("dense", 4, 2), TrainTransform(32, flip=True), 2)
    data = VideoDataset(Rows([Row(path, target)]), make, timeout=timeout)
    (batch,) = make_loader(
        data, EverySampler(1), batch_size=1, workers=workers, pin_memory=False, persistent=False
    )
    expected = data[0, 0].targets
    assert batch.targets["ids"] == [[(1, 2), (1, 2)]]
    for came, sent in zip(batch.targets["boxes"][0], expected, strict=True):
        assert torch.equal(came, sent["boxes"])
        assert (came.canvas_size, came.format) == ((32, 32), sent["boxes"].format)


def test_workers_hand_over_batches_on_a_full_disk(demo_root, monkeypatch):
    """They need a folder for it, and to wait for a batch that could not be sent has no end."""
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    make = views.TrainViews(Sampling("dense", 4, 2), TrainTransform(32, flip=True), 2)
    data = VideoDataset(Rows(_rows(demo_root)[:1]), make)
    loader = make_loader(data, EverySampler(1), batch_size=1, workers=1, pin_memory=False, persistent=False)
    loader.timeout = 20  # seconds

    def mkdtemp(*args, **how):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    (batch,) = loader
    assert batch.indices.tolist() == [0]


@pytest.mark.parametrize(("workers", "timeout"), [(0, None), (0, 30), (1, None), (1, 30)])
def test_pixels_changed_behind_the_upload_are_the_workers(demo_root, workers, timeout):
    """Clips of videos of two sizes, and targets that move with them; what cannot be read is left out."""
    box = tv_tensors.BoundingBoxes([[8, 8, 40, 40]], format="XYXY", canvas_size=(48, 64))
    rows = Rows([Row(row.path, {"boxes": box}) for row in _rows(demo_root)[:3]])
    runs = []
    for on_device in (False, True):
        make = views.TrainViews(Sampling("dense", 4, 2), TrainTransform(32, flip=True), 2, on_device)
        data = VideoDataset(rows, make, timeout=timeout)
        options = {"batch_size": 3, "workers": workers, "pin_memory": False, "persistent": False}
        (batch,) = Uploads(make_loader(data, EverySampler(3), **options), torch.device("cpu"))
        runs.append(batch)
    assert runs[1].draws is None
    assert torch.equal(runs[0].clips, runs[1].clips)
    for one, other in zip(*(batch.targets["boxes"] for batch in runs), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_batch_is_not_copied_where_its_clips_lie_one_behind_the_other(demo_root):
    data = _train_set(_rows(demo_root)[:3])
    data._guarded = Guard(data._read, 30)
    rows = data.rows
    data.rows = [rows[0], Row("nowhere.mp4", 0), rows[1]]
    data.substitute = False
    samples = data.__getitems__([(0, 0), (0, 1), (0, 2)])
    batch = collate(samples)
    assert batch.failed == [1]
    assert batch.clips.data_ptr() == samples[0].clips.data_ptr()
    assert batch.clips.is_shared()
    assert torch.equal(batch.clips[1], data[0, 2].clips)


def test_what_a_trainer_needs_imports_without_decoders():
    code = """
import sys, types
sys.modules |= dict.fromkeys(["av", "webdataset", "braceexpand", "decord"])
for name in ("stvit_video", "stvit_video.data"):
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [name.replace(".", "/")]
import stvit_video.data.batch, stvit_video.data.transforms, stvit_video.data.sampling
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_augmentation_is_the_same_in_all_frames():
    frame = torch.randint(256, (1, 3, 32, 40), dtype=torch.uint8).expand(5, -1, -1, -1)
    transform = TrainTransform(24, rand_augment=(4, 7), flip=True)
    for _ in range(10):
        clip, _ = transform(frame, 0)
        assert clip.dtype == torch.uint8
        assert (clip == clip[:1]).all()


def test_normalise():
    clip = torch.randint(256, (2, 3, 4, 5, 6), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    out = Normalise(mean, std)(clip)
    for channel in range(3):
        expected = (clip[:, channel] / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(out[:, channel], expected)


def test_mix():
    clips, labels = torch.randn(6, 3, 4, 8, 8), torch.arange(6)
    same, hard = Mix(6)(clips, labels)
    assert torch.equal(same, clips)
    assert torch.equal(hard, labels)
    mixed, soft = Mix(6, mixup=0.8)(clips, labels)
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    torch.testing.assert_close(mixed, torch.einsum("bk,kcthw->bcthw", soft, clips))
    mixed, soft = Mix(6, cutmix=1.0)(clips, labels)
    own = (mixed == clips).float().mean((1, 2, 3, 4))
    torch.testing.assert_close(soft.diagonal(), own)


def test_clips_of_one_video_are_not_mixed_with_each_other():
    """Repeated augmentation: views first, so that each clip's neighbour is another video's."""
    labels = torch.arange(4).repeat_interleave(2).view(4, 2)
    _, soft = Mix(4, mixup=0.8)(torch.randn(8, 3, 1, 4, 4), labels.t().flatten())
    assert (soft.max(1).values < 1).all()


def test_erasing_draws_a_box_a_clip_alike_in_its_frames():
    clips = torch.zeros(8, 3, 4, 16, 16)
    out, _ = Mix(2, erasing=1.0)(clips, torch.zeros(8, dtype=torch.long))
    boxes = (out != 0).any(1)
    assert boxes.flatten(1).any(1).all()
    assert (boxes == boxes[:, :1]).all()
    assert len({boxes[i].sum().item() for i in range(8)}) > 1


def _rows(demo_root, split="train"):
    paths = sorted((demo_root / split).glob("*/*.mp4"))
    return [Row(str(path), demo.CLASSES.index(path.parent.name)) for path in paths]


def _train_set(rows, seed=0):
    transform = TrainTransform(32, rand_augment=(2, 5))
    return VideoDataset(
        rows, views.TrainViews(Sampling("dense", 4, 2), transform, 2), seed=seed, substitute=True
    )


def test_a_sample_is_a_function_of_seed_epoch_and_index(demo_root):
    rows = _rows(demo_root)
    a, b = _train_set(rows), _train_set(rows)
    torch.rand(3)  # the global state does not matter, and is not touched
    before = torch.get_rng_state()
    assert torch.equal(a[1, 2].clips, b[1, 2].clips)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(a[1, 2].clips, a[2, 2].clips)
    assert not torch.equal(a[1, 2].clips, _train_set(rows, seed=1)[1, 2].clips)


def test_videos_that_are_kept_give_the_same_samples_and_are_decoded_once(demo_root, monkeypatch):
    rows = _rows(demo_root)
    plain, keeping = _train_set(rows), _train_set(rows)
    keeping.keep = True
    dataset.open_kept.cache_clear()
    opened = []
    real = dataset.open_video
    monkeypatch.setattr(dataset, "open_video", lambda *a, **k: opened.append(a[0]) or real(*a, **k))
    for epoch in (0, 1):
        for index in (0, 3):
            opened.clear()
            kept = keeping[epoch, index]
            assert len(opened) == (epoch == 0)
            for a, b in zip(plain[epoch, index], kept, strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_batches_do_not_depend_on_the_number_of_workers(demo_root):
    dataset = _train_set(_rows(demo_root))
    runs = []
    for workers in (0, 2):
        sampler = TrainSampler(len(dataset), batch_size=4, seed=3)
        sampler.epoch = 5
        loader = make_loader(dataset, sampler, batch_size=4, workers=workers, pin_memory=False)
        runs.append([batch.clips for batch in loader])
    assert len(runs[0]) == len(dataset) // 4
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_train_sampler_shares_an_epoch_among_ranks():
    ranks = [TrainSampler(103, batch_size=5, seed=0, rank=r, world=3) for r in range(3)]
    shares = [[index for _, index in sampler] for sampler in ranks]
    assert [len(share) for share in shares] == [30, 30, 30]
    assert len(set().union(*shares)) == 90
    ranks[0].epoch = 1
    assert [index for _, index in ranks[0]] != shares[0]


def test_a_set_smaller_than_a_batch_is_repeated():
    assert [index for _, index in TrainSampler(1, batch_size=3, seed=0)] == [0, 0, 0]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_test_sampler_gives_every_index_once(world):
    shares = [[i for _, i in EverySampler(10, rank=r, world=world)] for r in range(world)]
    assert sorted(sum(shares, [])) == list(range(10))


def test_unreadable_training_videos_are_stood_in_for_and_told(demo_root, tmp_path):
    rows = _rows(demo_root)[:3]
    bad = tmp_path / "text.mp4"
    bad.write_text("no video")
    dataset = _train_set([Row(str(bad), 0), *rows])
    batch = collate([dataset[0, 0], dataset[0, 2]])
    assert batch.indices.tolist() == [0, 2]
    assert batch.targets[0].tolist()[0] in [row.target for row in rows]
    assert [path for path, _ in batch.failures] == [str(bad)]
    assert batch.failed == []


def test_nothing_stands_in_for_an_unreadable_test_video(demo_root):
    rows = [Row("nowhere.mp4", 0), _rows(demo_root)[0]]
    make = views.TestViews(Sampling("dense", 4, 2), CropTransform(32), clips=1)
    loader = DataLoader(VideoDataset(rows, make), 2, sampler=EverySampler(2), collate_fn=collate)
    (batch,) = loader
    assert batch.indices.tolist() == [1]
    assert batch.failed == [0]
    assert "nowhere.mp4" in batch.failures[0][1]


def test_a_frame_list_that_says_more_than_there_is(tmp_path):
    from PIL import Image

    for i in range(3):
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / f"img_{i:05}.png")
    make = views.TestViews(Sampling("dense", 2, 1), CropTransform(16), clips=1)
    assert VideoDataset([Row(str(tmp_path), 0, 3)], make)[0, 0].clips is not None
    sample = VideoDataset([Row(str(tmp_path), 0, 4)], make)[0, 0]
    assert sample.clips is None
    assert "4 frames, there are 3" in sample.failures[0][1]


def test_scoring_asks_for_no_larger_frames_than_it_needs():
    video = Counter(10)
    views.TestViews(Sampling("dense", 2, 1), CropTransform(16, crop_ratio=0.8))(video, 0)
    assert video.short_side == 20


@pytest.mark.parametrize(("workers", "timeout"), [(0, None), (1, 30)])
def test_randaugment_behind_the_upload_is_the_workers(demo_root, workers, timeout, monkeypatch):
    """Operations on whole frames: by then some clips are crops, others whole; frames are made smaller."""
    runs, kept = [], []
    real = views.cut
    monkeypatch.setattr(views, "cut", lambda f, draw: kept.append(bool(draw.operations)) or real(f, draw))
    for on_device in (False, True):
        transform = TrainTransform(24, rand_augment=(2, 7), flip=True)  # 64 x 48 -> 47 x 35
        make = views.TrainViews(Sampling("dense", 4, 2), transform, 3, on_device)
        data = VideoDataset(_rows(demo_root)[:4], make, timeout=timeout)
        options = {"batch_size": 4, "workers": workers, "pin_memory": False, "persistent": False}
        (batch,) = Uploads(make_loader(data, EverySampler(4), **options), torch.device("cpu"))
        runs.append(batch)
    assert workers or {*kept} == {False, True}
    assert runs[1].draws is None
    assert runs[0].clips.shape == (4, 3, 3, 4, 24, 24)
    assert torch.equal(runs[0].clips, runs[1].clips)
