"""Segmentation: masks read right or not at all, moved with their pixels, scored to the last pixel."""

import contextlib
import csv
import itertools
import json
import shutil
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launch import finish, launch
from PIL import Image
from test_end_to_end import assert_same_runs, figures, run, train_in_two

from stvit_video import build, cli, create_model
from stvit_video.cli import scoring
from stvit_video.config import Config, DataConfig, ModelConfig, resolve
from stvit_video.data import demo_scenes, sampling
from stvit_video.data.annotations import read_rows
from stvit_video.data.decode import open_video
from stvit_video.data.mask_views import MaskReader, MaskTestViews, MaskTrainViews, resize
from stvit_video.data.masks import IGNORED, Masks
from stvit_video.data.rows import Row
from stvit_video.data.transforms import Normalise
from stvit_video.data.views import Sampling
from stvit_video.engine.job import Outcome
from stvit_video.errors import DecodeError, InputError, ListError
from stvit_video.models.segmentation import IGNORED as IGNORED_IN_LOSS
from stvit_video.models.segmentation import pixel_loss
from stvit_video.recognizer import load_model
from stvit_video.tasks import SegmentationScoring
from stvit_video.tasks.segmentation import Segmentation, read_png, starts
from stvit_video.tasks.token_counts import TokenCounts
from stvit_video.weights import load_weights

NORMALISE = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SMALL = """
device: cpu
task: segmentation
model: {name: vit_tiny_patch16_224, patch_size: [1, 8, 8], embed_dim: 24, depth: 2, num_heads: 2}
data: {num_frames: 1, image_size: 32, short_side: 40, workers: 0}
train: {epochs: 2, batch_size: 2, accumulate: 2, lr: 1e-3, lr_per: 4, warmup_epochs: 1, schedule: poly,
  head_lr: 10.0, ema: 0.9, log_every: 1}
eval: {batch_size: 3, view_batch: 3}
"""


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels))
    (image.convert(mode) if mode else image).save(path)


def task(classes=4, **options):
    return Segmentation([f"c{i}" for i in range(classes)], normalise=NORMALISE, **options)


def read(target, frames=(0,), num_frames=1, size=(6, 8), *, classes=4, ignore=255):
    return target.read(frames, num_frames, size, classes=classes, ignore=ignore)


# ---- lists

LAYOUTS = {  # list, image, mask, what the mask holds, the ids that this is
    "ade20k": ("images/training", "{}/a.jpg", "annotations/training/a.png", [0, 1, 4], [255, 0, 3]),
    "cityscapes": (
        *("leftImg8bit/train", "{}/bonn/b_1_leftImg8bit.png", "gtFine/train/bonn/b_1_gtFine_labelIds.png"),
        *([0, 7, 33], [255, 0, 18]),
    ),
    "coco_stuff": (
        "images/train2017",
        "{}/0009.jpg",
        "annotations/train2017/0009_labelTrainIds.png",
        [3],
        [3],
    ),
    "coco_stuff_ids": (
        "images/val2017",
        "{}/0009.jpg",
        "annotations/val2017/0009.png",
        [0, 12, 25],
        [0, 11, 255],
    ),
    "masks": ("images/val", "{}/a.png", "masks/val/a.png", [0, 3, 255], [0, 3, 255]),
    "annotations": ("images/val", "{}/a.bmp", "annotations/val/a.png", [2], [2]),
    "voc_masks": (
        *("ImageSets/Segmentation/val.txt", "JPEGImages/a.jpg", "SegmentationClass/a.png", [0, 20, 255]),
        [0, 20, 255],
    ),
    "pascal_context": (
        *("ImageSets/SegmentationContext/val.txt", "JPEGImages/a.jpg", "SegmentationClassContext/a.png"),
        *([0, 3], [255, 2]),
    ),
    "davis": (
        *("ImageSets/2017/val.txt", "JPEGImages/480p/a/00000.jpg", "Annotations/480p/a/00000.png"),
        *([0, 1, 38], [0, 1, 1]),
    ),
    "vspw": ("val.txt", "data/a/origin/0.jpg", "data/a/mask/0.png", [0, 1, 124], [255, 0, 123]),
    "pairs": ("val.csv", "any/a.jpg", "where/a_mask.png", [1], [1]),
}
CLASSES = {"pascal_context": 59, "davis": 2, "voc_masks": 21, "vspw": 124}


@pytest.mark.parametrize("name", LAYOUTS)
def test_lists_of_masks_are_told_by_their_layout(tmp_path, name):
    place, image, mask, values, ids = LAYOUTS[name]
    image = tmp_path / image.format(place)
    save(image, np.zeros((6, 8, 3), np.uint8))
    save(tmp_path / mask, np.resize(np.uint8(values), (6, 8)))
    if not (tmp_path / place).is_dir():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        line = "image,mask\nany/a.jpg, where/a_mask.png\n" if name == "pairs" else "a\n"
        (tmp_path / place).write_text(line)
    (row,) = read_rows(tmp_path / place)
    assert row == read_rows(tmp_path / place, format=name)[0]
    video = name in ("davis", "vspw")
    assert row.path == str(image.parent if video else image)
    assert repr(row.target).startswith("Masks(path=")
    assert str(tmp_path) in repr(row.target)
    assert str(tmp_path) not in str(row.target), "a list is the same wherever it lies"
    masks = read(row.target, classes=CLASSES.get(name, 171))
    np.testing.assert_array_equal(masks[0], np.resize(np.uint8(ids), (6, 8)))


def test_pascal_context_has_59_or_60_classes(tmp_path):
    save(tmp_path / "a.png", np.resize(np.uint8([0, 59]), (6, 8)))
    for classes, ids in ((59, [255, 58]), (60, [0, 59])):
        masks = read(Masks(str(tmp_path / "a.png"), "context"), classes=classes)
        np.testing.assert_array_equal(masks[0], np.resize(np.uint8(ids), (6, 8)))


def test_lists_of_classes_stay_what_they_were(tmp_path):
    for folder in ("images/training", "images/train2017", "leftImg8bit/train"):
        for label in ("cat", "dog"):
            save(tmp_path / folder / label / "a.jpg", np.zeros((6, 8, 3), np.uint8))
    (tmp_path / "annotations" / "training").mkdir(parents=True)
    (tmp_path / "annotations" / "training" / "a.xml").write_text("<annotation/>")
    for folder in ("images/training", "images/train2017", "leftImg8bit/train"):
        assert [row.target for row in read_rows(tmp_path / folder)] == [0, 1]
    (tmp_path / "a.jpg b.png").touch()
    for line in ("a.jpg b.png\n", "a.jpg 1\n", "a.jpg 1,2\n"):
        (tmp_path / "list.txt").write_text(line)
        assert not isinstance(read_rows(tmp_path / "list.txt", root=tmp_path)[0].target, Masks)


def test_names_lie_beside_the_images(tmp_path):
    save(tmp_path / "images" / "val" / "a.png", np.zeros((6, 8, 3), np.uint8))
    save(tmp_path / "masks" / "val" / "a.png", np.zeros((6, 8), np.uint8))
    assert read_rows(tmp_path / "images" / "val").class_names is None
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    assert read_rows(tmp_path / "images" / "val").class_names == ["sky", "road"]
    (tmp_path / "classes.txt").write_text("sky\nroad\n", encoding="utf-8-sig")
    assert read_rows(tmp_path / "images" / "val").class_names == ["sky", "road"]
    (tmp_path / "classes.txt").write_text("straße\n", encoding="latin-1")
    with pytest.raises(ListError, match="classes.txt: found .*expected class names, one a line"):
        read_rows(tmp_path / "images" / "val")


# ---- files


def test_a_mask_is_read_whatever_it_is_stored_as(tmp_path):
    ids = np.resize(np.uint8([0, 1, 2, 3, 255]), (6, 8))
    palette = Image.fromarray(ids)
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    palette.save(tmp_path / "palette.png")
    few = Image.fromarray(ids % 4)
    few.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7, 6, 6, 6])  # two bits a pixel
    few.save(tmp_path / "few.png")
    Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "deep.png")
    save(tmp_path / "grey.png", np.stack([ids] * 3, -1))
    save(tmp_path / "opaque.png", np.stack([ids] * 3 + [np.full_like(ids, 255)], -1))
    save(tmp_path / "plain.bmp", ids)
    for file in ("palette.png", "deep.png", "grey.png", "opaque.png", "plain.bmp"):
        np.testing.assert_array_equal(read(Masks(str(tmp_path / file)))[0], ids, file)
    np.testing.assert_array_equal(read(Masks(str(tmp_path / "few.png")))[0], ids % 4)
    expected = np.where(ids % 4 == 3, IGNORED, ids % 4)
    np.testing.assert_array_equal(read(Masks(str(tmp_path / "few.png")), ignore=3)[0], expected)


def grey_png(ids, bits):
    """PIL writes no grey levels of fewer than 8 bits."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    lines = np.packbits(np.unpackbits(ids[..., None], axis=2)[..., -bits:].reshape(len(ids), -1), axis=1)
    head = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_levels_of_few_bits_are_numbers_too(tmp_path, bits):
    """PIL stretches those of 2 and 4 bits to 255."""
    ids = np.resize(np.arange(2**bits, dtype=np.uint8), (6, 8))
    (tmp_path / "few.png").write_bytes(grey_png(ids, bits))
    np.testing.assert_array_equal(read(Masks(str(tmp_path / "few.png")), classes=48)[0], ids)


def test_a_flipped_bit_anywhere_makes_no_other_mask(tmp_path):
    ids = np.random.default_rng(0).integers(0, 4, (6, 8), np.uint8)
    sound, path = grey_png(ids, 8), tmp_path / "flipped.png"
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        with contextlib.suppress(DecodeError):
            np.testing.assert_array_equal(read(Masks(str(path)))[0], ids)


def colours(ids):
    return np.stack([ids * 60, ids * 40, ids * 20], -1)


BAD = {
    "small.png": (lambda ids: ids[:3], "small.png: a mask of 8x3 pixels for an image of 8x6"),
    "high.png": (lambda ids: ids + 2, r"high.png: value 4 is none of 4 classes \(a value is a class id\)"),
    "deep.png": (lambda ids: ids.astype(np.uint16) * 300, "deep.png: value 300 is none of 4 classes"),
    "rgb.png": (colours, r"rgb.png: colour \(60, 40, 20\) in a mask: must hold a number a pixel"),
    "mask.jpg": (lambda ids: ids, "mask.jpg: a mask in a format that may change values: must be one of"),
    "floats.tif": (lambda ids: ids.astype(np.float32), "floats.tif: values of float32 .*: must be numbers"),
    "gone.png": (None, "gone.png: no such mask"),
    "text.png": (lambda ids: "not an image", "text.png: damaged, or no mask"),
    "cut.png": (lambda ids: b"", "cut.png: damaged, or no mask"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_mask_makes_its_row_unreadable(tmp_path, name):
    make, message = BAD[name]
    path = tmp_path / name
    ids = np.resize(np.uint8([0, 1, 2, 3]), (6, 8))
    if name == "cut.png":
        save(path, np.random.default_rng(0).integers(0, 4, (6, 8), np.uint8))
        path.write_bytes(path.read_bytes()[:-30])
    elif name == "text.png":
        path.write_text(make(ids))
    elif make is not None:
        save(path, make(ids))
    with pytest.raises(DecodeError, match=message) as error:
        read(Masks(str(path)))
    assert "\n" not in str(error.value)


def test_a_video_needs_a_mask_for_every_frame(tmp_path):
    for i in range(3):
        save(tmp_path / "m" / f"{i}.png", np.full((6, 8), i, np.uint8))
    (tmp_path / "m" / "._0.png").write_bytes(b"what macOS leaves")
    masks = read(Masks(str(tmp_path / "m")), frames=(2, 0), num_frames=3)
    assert masks[:, 0, 0].tolist() == [2, 0]
    with pytest.raises(DecodeError, match="m: 3 masks for a video of 4 frames"):
        read(Masks(str(tmp_path / "m")), frames=(0,), num_frames=4)


# ---- pixels


def train_views(**changes):
    values = {"size": 32, "short_side": None, "zoom": (0.5, 2.0), "max_share": 0.75, "mirror": None}
    values |= {"distort": False, "fill": (7, 8, 9)} | changes
    return MaskTrainViews(Sampling("dense", 1), MaskReader(4, 255), **values)


def test_masks_move_with_their_pixels():
    """Frames whose colour is 60 x the class, except where a frame was made larger, which blurs edges."""
    ids = torch.arange(4, dtype=torch.uint8).view(2, 2).repeat_interleave(24, 0).repeat_interleave(24, 1)
    ids = torch.stack([ids, 3 - ids])
    frames = (60 * ids[:, None]).expand(-1, 3, -1, -1)
    views = train_views(zoom=(0.5, 1.5), mirror=lambda mask: mask)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        out, masks = views.augment(frames, ids)
        assert out.shape == (2, 3, 32, 32)
        assert masks.shape == (2, 32, 32)
        padded = masks == IGNORED
        seen.add(bool(padded.any()))
        assert (out[:, :, padded[0]] == torch.tensor([7, 8, 9])[:, None]).all()
        wrong = ((out[:, 0].float() / 60 - masks).abs() > 0.05) & ~padded
        edges = torch.zeros_like(wrong)
        for axis in (1, 2):  # of two classes: three pixels to each side may be blurred
            change = masks.diff(dim=axis) != 0
            for shift in range(-3, 4):
                place = change.roll(shift, axis)
                edges.narrow(axis, 0, 31).logical_or_(place)
        assert not (wrong & ~edges).any()
        sums = (out[0, 0].int() + out[1, 0].int())[~padded[0]]
        assert ((sums - 180).abs() <= 1).all(), "both frames alike"
    assert seen == {True, False}
    torch.manual_seed(1)
    out, masks = train_views(zoom=(1.0, 1.0), mirror=lambda mask: mask).augment(frames, ids)
    assert torch.equal(out[:, 0], 60 * masks), "nothing is blurred where nothing is scaled"


def test_mirroring_swaps_sides():
    sides = task(3, twins=[1, 0, 2])
    mask = torch.tensor([[0, 1, 2, IGNORED]], dtype=torch.uint8)
    assert sides.mirror(mask).tolist() == [[1, 0, 2, IGNORED]]
    assert task(3).mirror(mask) is mask


def test_no_class_fills_a_crop_where_ten_tries_can_help():
    ids = torch.zeros(1, 64, 64, dtype=torch.uint8)
    ids[:, :, 32:] = 1
    ids[:, :4] = IGNORED
    frames = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    shares = {}
    for limit in (0.75, 1.1):
        views, worst = train_views(zoom=(1.0, 1.0), max_share=limit), []
        for seed in range(40):
            torch.manual_seed(seed)
            _, mask = views.augment(frames, ids)
            counts = torch.bincount(mask.flatten().int(), minlength=256)[:2]
            worst.append((counts.max() / counts.sum()).item())
        shares[limit] = max(worst)
    assert shares[0.75] < 0.75 < 0.9 < shares[1.1]
    one = torch.zeros(1, 64, 64, dtype=torch.uint8)
    assert (views.augment(frames, one)[1] == 0).all(), "one class everywhere: the tenth try stays"


def test_distortion_changes_colours_and_no_mask():
    frames, ids = (
        torch.full((2, 3, 32, 32), 120, dtype=torch.uint8),
        torch.zeros(2, 32, 32, dtype=torch.uint8),
    )
    frames[:, 0] = 200
    views, changed = train_views(zoom=(1.0, 1.0), distort=True), 0
    for seed in range(8):
        torch.manual_seed(seed)
        out, masks = views.augment(frames, ids)
        assert torch.equal(masks, ids)
        assert torch.equal(out[0], out[1]), "all frames alike"
        changed += not torch.equal(out, frames)
    assert 0 < changed <= 8


@pytest.mark.parametrize(("length", "stride"), [(1, 3), (4, 1), (4, 2), (9, 4)])
@pytest.mark.parametrize("frames", [1, 4, 7, 13])
def test_every_frame_of_a_video_is_in_a_clip(frames, length, stride):
    clips = sampling.every_frame(frames, length, stride)
    assert {frame for clip in clips for frame in clip} == set(range(frames))
    assert all(len(clip) == length for clip in clips)
    steps = {b - a for clip in clips for a, b in itertools.pairwise(clip)}
    assert steps <= {0, stride}
    if frames >= length * stride:
        assert 0 not in steps


# ---- scores


class Colours(torch.nn.Module):
    """A segmenter for tests: class 0 where a pixel is dark, 1 where it is red, ...; and what it saw."""

    size = None

    def __init__(self, size=None):
        super().__init__()
        self.size, self.shown = size, []

    def forward(self, x):
        self.shown.append(tuple(x.shape))
        return torch.stack([torch.zeros_like(x[:, 0]), *x.unbind(1)], 1)

    def scores(self, outputs, size):
        assert tuple(outputs.shape[2:]) == tuple(size)
        return outputs


def test_one_window_is_the_whole_image():
    clip = torch.randint(0, 256, (3, 2, 24, 24), dtype=torch.uint8)
    whole = task().predict(Colours(), clip, (2, 24, 24))
    assert torch.equal(whole, task().predict(Colours((24, 24)), clip, (2, 24, 24)))
    assert torch.equal(whole, task().predict(Colours((30, 40)), clip, (2, 24, 24)))  # padded, and cut off
    model = Colours((16, 10))
    parts = task(view_batch=3, scoring=SegmentationScoring(window_stride=7))
    assert torch.equal(whole, parts.predict(model, clip, (2, 24, 24))), "colours do not ask their window"
    assert model.shown == [(3, 3, 2, 16, 10)] * 3
    larger = task().predict(Colours(), clip, (2, 48, 48))
    assert larger.shape == (2, 48, 48)


def test_windows_are_averaged():
    class Ramp(Colours):
        def scores(self, outputs, size):
            ramp = torch.arange(size[2], dtype=torch.float32).expand(len(outputs), 1, *size)
            return torch.cat([ramp, 2 * ramp, -ramp, 0 * ramp], 1)

    clip = torch.zeros(3, 1, 4, 10)
    scores = task(scoring=SegmentationScoring(window_stride=3))._windows(Ramp((4, 6)), clip, TokenCounts())
    places = [range(0, 6), range(3, 9), range(4, 10)]
    expected = [np.mean([x - p[0] for p in places if x in p]) for x in range(10)]
    torch.testing.assert_close(scores[0, 0, 2], torch.tensor(expected, dtype=torch.float32))
    assert starts(10, 6, 3) == [0, 3, 4]
    assert starts(6, 6, 3) == [0]
    assert starts(5, 6, None) == [0]
    assert starts(30, 6, None) == [0, 4, 8, 12, 16, 20, 24]
    assert starts(18, 6, 50) == [0, 6, 12], "no gaps"


def test_mirrored_scores_of_a_mirrored_image_are_mirrored():
    torch.manual_seed(0)
    model = tiny("vit_tiny_patch16_224", "linear").eval()
    torch.nn.init.normal_(model.backbone.pos_embed)
    clip = torch.randint(0, 256, (3, 1, 40, 56), dtype=torch.uint8)
    both = task(scoring=SegmentationScoring(mirrored=True, zooms=(1.0, 1.5)))
    with torch.no_grad():
        once = both.predict(model, clip, (1, 40, 56))
        twice = both.predict(model, clip.flip(-1), (1, 40, 56)).flip(-1)
        plain = task().predict(model, clip, (1, 40, 56))
    assert (once == twice).float().mean() > 0.999  # sums in another order
    assert not torch.equal(plain, once)


def test_each_zoom_starts_from_what_the_file_holds():
    """Not from frames that were brought to data.short_side, which is to lose detail and make up some."""
    frames = torch.randint(0, 256, (1, 3, 32, 40), dtype=torch.uint8)
    video = SimpleNamespace(num_frames=1, read=lambda indices, short_side=None: frames)
    scorer = task(scoring=SegmentationScoring(zooms=(1.0, 2.0, 4.0)))
    data = DataConfig(num_frames=1, short_side=8)
    views = scorer.test_views(Sampling("middle", 1), data, clips=1, crops=1, crop_ratio=1.0)
    clip, (truth,) = views(video, None)
    seen, model = [], Colours()
    model.forward = lambda x: seen.append(x) or Colours.forward(model, x)
    scorer._record(model, clip, [truth], None)
    for x, side in zip(seen, (8, 16, 32), strict=True):
        once = resize(frames, side).transpose(0, 1)
        assert torch.equal(x[0], scorer.normalise(once))


def brute_force(predictions, truths, classes):
    """Walk over all pixels -> mIoU, accuracy, mean class accuracy, IoU of each class."""
    right, either, there = ([0] * classes for _ in range(3))
    for prediction, truth in zip(predictions, truths, strict=True):
        for p, t in zip(prediction.flatten().tolist(), truth.flatten().tolist(), strict=True):
            if t == IGNORED:
                continue
            there[t] += 1
            right[t] += p == t
            for c in {p, t}:
                either[c] += 1
    ious = [r / e if e else None for r, e in zip(right, either, strict=True)]
    accuracies = [r / t for r, t in zip(right, there, strict=True) if t]
    known = [iou for iou in ious if iou is not None]
    return sum(known) / len(known), sum(right) / sum(there), sum(accuracies) / len(accuracies), ious


def test_scores_that_are_no_numbers_are_no_prediction():
    clip = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    for how in (SegmentationScoring(), SegmentationScoring(mirrored=True)):
        broken = Colours()
        broken.scores = lambda outputs, size: outputs.index_fill(1, torch.tensor(2), torch.nan)
        with pytest.raises(InputError, match="scores are no numbers: it diverged"):
            task(scoring=how).predict(broken, clip, (1, 4, 4))


class Fixed(torch.nn.Module):
    """Says of each image what the test gives."""

    size = None

    def __init__(self, predictions):
        super().__init__()
        self.next = iter(predictions)

    def forward(self, x):
        return torch.nn.functional.one_hot(next(self.next).long(), 6).movedim(-1, 1).float()

    def scores(self, outputs, size):
        return outputs


def batch_of(clips, truths, previews=None):
    class Batch:
        pass

    Batch.clips, Batch.targets, Batch.previews = clips, truths, previews or [None] * len(clips)
    return Batch


def test_figures_are_those_of_a_walk_over_all_pixels(tmp_path):
    from stvit_video.data.mask_views import Truth

    generator = torch.Generator().manual_seed(0)
    sizes = [(5, 7), (6, 4), (3, 3)]
    predictions = [torch.randint(0, 5, (1, 1, *size), generator=generator) for size in sizes]
    truths = [torch.randint(0, 4, (1, *size), generator=generator, dtype=torch.uint8) for size in sizes]
    for truth in truths:
        truth[0, 0, :2] = IGNORED
    six = task(6)  # class 4 is predicted only, class 5 nowhere
    batch = batch_of(
        [torch.zeros(1, 3, 1, *size, dtype=torch.uint8) for size in sizes],
        [[Truth(truth, [0])] for truth in truths],
    )
    records = six.records(Fixed(predictions), batch)
    assert all(record["counts"].dtype == torch.int64 for record in records)
    rows = [Row(f"{i}.png", Masks(f"{i}.png")) for i in range(4)]
    outcome = Outcome(rows, [*records[:2], None, records[2]], {2: "gone"})
    miou, accuracy, class_accuracy, ious = brute_force(predictions, truths, 6)
    found = six.figures(outcome)
    assert found["mIoU"] == pytest.approx(miou, abs=1e-12)
    assert found["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert found["mean_class_accuracy"] == pytest.approx(class_accuracy, abs=1e-12)
    assert list(found["classes"].values()) == pytest.approx(ious, abs=1e-12)
    assert found["classes"]["c4"] == 0.0
    assert found["classes"]["c5"] is None
    six.report(tmp_path, outcome, found)
    with open(tmp_path / "predictions.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["failure"] for line in lines] == ["", "", "gone", ""]
    for i, place in enumerate((0, 1, 3)):
        value = brute_force(predictions[i : i + 1], truths[i : i + 1], 6)
        assert float(lines[place]["mIoU"]) == pytest.approx(value[0], abs=1e-6)
    nothing = six.figures(Outcome(rows[:1], [None], {0: "gone"}))
    assert set(nothing.values()) == {None}


def test_frames_of_overlapping_clips_count_once():
    from stvit_video.data.mask_views import Truth

    truth = torch.zeros(3, 2, 2, dtype=torch.uint8)
    wrong, right = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    batch = batch_of(
        [torch.zeros(2, 3, 3, 2, 2, dtype=torch.uint8)],
        [[Truth(truth, [0, 1, 2]), Truth(truth, [1, 2, 3])]],
    )
    (record,) = task(6).records(Fixed([wrong, right]), batch)
    assert record["counts"].sum(1).tolist() == [4, 16, 16]
    assert record["counts"][0, 0] == 4, "only frame 3 is right"


def test_a_prediction_is_kept_drawn_and_written(tmp_path):
    from stvit_video.data.mask_views import Truth

    unknown = torch.full((1, 2, 3), IGNORED, dtype=torch.uint8)
    said = torch.tensor([[[[0, 1, 1], [5, 5, 5]]]])
    batch = batch_of([torch.zeros(1, 3, 1, 2, 3, dtype=torch.uint8)], [[Truth(unknown, [0])]])
    six = task(6)
    (record,) = six.records(Fixed([said]), batch)
    classes = six.plain(record)["classes"]
    assert list(classes.items()) == [("c5", 0.5), ("c1", 0.333333), ("c0", 0.166667)]
    frame = np.full((2, 3, 3), 100, np.uint8)
    drawn = six.draw(frame, record)
    assert (frame == 100).all()
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) == 3
    six.write(tmp_path / "street", record)
    with Image.open(tmp_path / "street_mask.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), said[0, 0])
    known = [[Truth(torch.tensor([[[0, 255, 1], [1, 1, 1]]], dtype=torch.uint8), [0])]]
    (plain,) = six.records(Fixed([said]), batch_of(batch.clips, known))
    assert "masks" not in plain, "what is scored alone needs no picture"
    (shown,) = six.records(Fixed([said]), batch_of(batch.clips, known, [b"preview"]))
    assert read_png(shown["truth"][0]).tolist() == [[0, 255, 1], [1, 1, 1]]


def test_ignored_pixels_cost_nothing():
    assert IGNORED == IGNORED_IN_LOSS
    logits = torch.randn(2, 4, 1, 3, 3, requires_grad=True)
    targets = torch.randint(0, 4, (2, 1, 3, 3))
    targets[0, 0, 0] = IGNORED
    loss = pixel_loss(logits, targets)
    logp, kept = logits.log_softmax(1), targets != IGNORED
    picked = logp.movedim(1, -1)[kept].gather(1, targets[kept][:, None])
    torch.testing.assert_close(loss, -picked.mean())
    assert pixel_loss(logits, torch.full_like(targets, IGNORED)).item() == 0


# ---- models


def tiny(name, head, classes=4, frames=1, **sizes):
    if "swin" in name:
        depth = 6 if "_r_" in name else 2
        small = {"embed_dim": 8, "depths": [1, 1, depth, 1], "num_heads": [1, 1, 2, 2], "image_size": 64}
    else:
        small = {"embed_dim": 24, "depth": 6, "num_heads": 2, "image_size": 32, "patch_size": (1, 8, 8)}
        if name.startswith("stvit"):
            small |= {"base_depth": 2, "semantic_tokens": (frames, 2, 2)}
    if head == "upernet":
        small["head_dim"] = 16
    return create_model(name, num_classes=classes, num_frames=frames, head=head, **small | sizes)


BACKBONES = {
    "vit_tiny_patch16_224": 1,
    "stvit_tiny_patch16_224": 2,
    "swin_tiny_patch4_window7_224": 1,
    "stvit_r_swin_small": 1,
    "stvit_r_det_swin_small": 1,
    "stvit_r_video_swin_small": 2,
}


@pytest.mark.parametrize("head", ["linear", "upernet"])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_that_learns_gets_a_gradient(name, head):
    frames = BACKBONES[name]
    model = tiny(name, head, frames=frames)
    side = 64 if "swin" in name else 32
    clips = torch.randint(0, 256, (2, 1, 3, frames, side, side), dtype=torch.uint8)
    batch = batch_of(clips, torch.randint(0, 4, (2, 1, frames, side, side), dtype=torch.uint8))
    losses = task().loss(model, batch)
    losses["loss"].backward()
    without = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    idle = ("proj.bias", "k.bias")
    assert not [n for n in without if not n.endswith(idle)]
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert all("norm" in n for n in frozen)
    again = create_model(**model.built)
    again.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, frames, side, side)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_one_image_is_too_few_for_the_batch_norms_of_upernet():
    model, image = tiny("vit_tiny_patch16_224", "upernet"), torch.zeros(1, 3, 1, 32, 32)
    with pytest.raises(InputError, match="a batch of 1 image .*: raise train.batch_size"):
        model.train()(image)
    model.eval()(image)


def test_images_of_any_size_are_padded_to_whole_patches():
    model = tiny("swin_tiny_patch4_window7_224", "upernet").eval()
    x = torch.randn(1, 3, 1, 50, 70)
    padded = torch.nn.functional.pad(x, [0, 26, 0, 14])
    with torch.no_grad():
        scores, of_padded = (model.scores(model(clip), tuple(clip.shape[2:])) for clip in (x, padded))
    assert scores.shape == (1, 4, 1, 50, 70)
    assert torch.equal(scores, of_padded[..., :50, :70])


def test_tubelets_speak_for_all_their_frames():
    model = tiny("vit_tiny_patch16_224", "linear", frames=4, patch_size=(2, 8, 8)).eval()
    logits = model(torch.randn(1, 3, 4, 32, 32))
    assert logits.shape == (1, 4, 2, 4, 4)
    assert model.scores(logits, (4, 32, 32)).shape == (1, 4, 4, 32, 32)


@pytest.mark.parametrize("name", ["video_swin_tiny", "stvit_r_video_swin_small"])
def test_a_tubelet_that_sticks_out_of_a_clip_moves_no_frame(name):
    model, patches = tiny(name, "linear", frames=4), torch.randn(1, 4, 3, 2, 2)
    six = model.resized(patches, (6, 64, 64))
    assert torch.equal(model.resized(patches, (5, 64, 64)), six[:, :, :5])
    assert model(torch.randn(1, 3, 5, 64, 64)).shape == patches.shape


def test_backbones_without_grids_are_refused():
    with pytest.raises(ValueError, match=r"patch grids up to stage 2 only; STViT-R has all 4"):
        create_model("stvit_swin_tiny", num_classes=4, head="linear")
    with pytest.raises(ValueError, match="too few for the head"):
        tiny("vit_tiny_patch16_224", "upernet", depth=3)


def test_a_classifiers_checkpoint_comes_in():
    donor = create_model("vit_tiny_patch16_224", num_classes=7, **{**VIT, "image_size": 64})
    model = tiny("vit_tiny_patch16_224", "linear")
    report = load_weights(model, donor.state_dict())
    assert set(report.dropped) == {"head.weight", "head.bias"}
    assert set(report.resized) == {"pos_embed"}
    for name, tensor in model.backbone.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(tensor, donor.state_dict()[name])


VIT = {"num_frames": 1, "embed_dim": 24, "depth": 6, "num_heads": 2, "patch_size": (1, 8, 8)}


# ---- runs


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A small rendering: images of 32 and 48 pixels, two clips of 5 frames."""
    root = tmp_path_factory.mktemp("data") / "demo_scenes"
    with pytest.MonkeyPatch.context() as patch:
        few = {"train": 8, "test": 5, "clips_train": 1, "clips_test": 2}
        patch.setattr(demo_scenes, "SETTINGS", demo_scenes.SETTINGS | few)
        patch.setattr(demo_scenes, "SIZES", (32, 48))
        patch.setattr(demo_scenes, "CLIP_FRAMES", 5)
        demo_scenes.prepare_scenes(root, workers=1)
    return root


@pytest.fixture(scope="module")
def args(scenes, tmp_path_factory):
    path = tmp_path_factory.mktemp("segment") / "small.yaml"
    path.write_text(SMALL)
    return ["--cfg", str(path), f"--data.train={scenes}/train.txt", f"--data.val={scenes}/test.txt"]


@pytest.fixture(scope="module")
def unbroken(args, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken") / "run"
    assert run(cli.train, *args, f"--output={output}") == 0
    return output


def test_the_scenes_are_what_their_lists_say(scenes):
    rows = read_rows(scenes / "train.txt")
    assert rows.class_names == list(demo_scenes.CLASSES)
    assert len(rows) == 8
    for row in rows:
        with open_video(row.path) as video:
            frame = video.read([0])[0]
            size = {"num_frames": 1, "size": frame.shape[1:], "classes": 8}
            assert read(row.target, **size).shape == (1, *frame.shape[1:])
    for split, count in (("clips_train", 1), ("clips_test", 2)):
        clips = read_rows(scenes / f"{split}.txt")
        assert [Row(row.path, row.target).target.values for row in clips] == ["from_one"] * count
    again = [demo_scenes.render(np.random.default_rng(3), 64, 2) for _ in range(2)]
    for a, b in zip(*again, strict=True):
        np.testing.assert_array_equal(a, b)
    pixels, masks = again[0]
    assert pixels.shape == (2, 64, 64, 3)
    assert masks.max() < 8


def test_a_run_ends_as_if_unbroken(args, unbroken, tmp_path, monkeypatch):
    train_in_two(args, tmp_path / "run", monkeypatch)
    assert_same_runs(unbroken, tmp_path / "run")


def scored(folder):
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    report = json.loads((folder / "report.json").read_text()) | {"seconds": 0}
    return report, rows, (folder / "classes.csv").read_text()


def test_any_number_of_ranks_scores_every_image_once(args, unbroken, tmp_path):
    given = [*args, f"--checkpoint={unbroken}/last.pt"]
    assert run(cli.test, *given, f"--output={tmp_path}/1", "--eval.batch_size=1") == 0
    for ranks in (2, 3):
        log = tmp_path / f"{ranks}.txt"
        started = launch(cli.test, *given, f"--output={tmp_path}/{ranks}", ranks=ranks, log=log)
        assert finish(started) == [0] * ranks, log.read_text()
    reports = [scored(tmp_path / name) for name in "123"]
    assert reports[0] == reports[1] == reports[2]
    report, rows, _ = reports[0]
    assert len(rows) == report["num_videos"] == 5
    last = [entry for entry in figures(unbroken) if entry["kind"] == "epoch"][-1]
    assert report["mIoU"] == pytest.approx(last["val_mIoU"], abs=1e-9)
    assert list(report["classes"]) == list(demo_scenes.CLASSES)
    assert (tmp_path / "1" / "worst.png").stat().st_size > 10_000


def test_ranks_train_one_model(args, tmp_path):
    """Every parameter that learns is used in every update: DistributedDataParallel waits for them all."""
    log, given = tmp_path / "out.txt", [*args, "--model.head=upernet", "--model.head_dim=8"]
    given += ["--model.depth=4", "--train.epochs=1", "--train.accumulate=1", f"--output={tmp_path}/run"]
    assert finish(launch(cli.train, *given, ranks=2, log=log)) == [0, 0], log.read_text()
    entries = figures(tmp_path / "run")
    assert [entry["step"] for entry in entries if entry["kind"] == "step"] == [1, 2]
    assert 0 < entries[-1]["val_mIoU"] < 1


def test_unreadable_masks_are_counted_and_left_out(args, scenes, unbroken, tmp_path):
    shutil.copytree(scenes, tmp_path / "set")
    mask = tmp_path / "set" / "masks" / "test_0001.png"
    save(mask, np.zeros((3, 3), np.uint8))
    given = [*args, f"--checkpoint={unbroken}/last.pt", f"--data.test={tmp_path}/set/test.txt"]
    assert run(cli.test, *given, f"--output={tmp_path}/scored", "--eval.dump_views=true") == 0
    report, rows, _ = scored(tmp_path / "scored")
    assert (report["num_failed"], report["on_failure"]) == (1, "exclude")
    assert "test_0001.png: a mask of 3x3 pixels for an image" in rows[1]["failure"]
    names = sorted(path.name for path in (tmp_path / "scored" / "masks").iterdir())
    assert names == [f"{i:06d}_test_{i:04d}_mask.png" for i in (0, 2, 3, 4)]


def test_clips_are_trained_on_and_scored(args, scenes, tmp_path):
    lists = [f"--data.train={scenes}/clips_train.txt", f"--data.val={scenes}/clips_test.txt"]
    video = ["--data.num_frames=2", "--data.stride=2", "--model.patch_size=[2,8,8]", "--train.epochs=1"]
    assert run(cli.train, *args[:2], *lists, *video, f"--output={tmp_path}/run") == 0
    given = [*args[:2], *lists, f"--checkpoint={tmp_path}/run/last.pt", f"--output={tmp_path}/scored"]
    assert run(cli.test, *given, "--data.stride=2") == 0
    pixels = sum(Image.open(p).size[0] ** 2 for p in scenes.glob("data/clips_test_*/mask/*.png"))
    assert sum(int(row["pixels"]) for row in scored(tmp_path / "scored")[1]) == pixels


def test_settings_that_mean_nothing_here_are_refused(tmp_path):
    views = task().train_views
    for change in ({"augment_on": "device"}, {"rand_augment": (1, 5)}):
        with pytest.raises(InputError, match="segmentation has pixels of its own"):
            views(Sampling("dense", 1), DataConfig(mean=(0.5,) * 3, std=(0.5,) * 3, **change))
    with pytest.raises(InputError, match="1 classes: must be 2 to 255.*set data.num_classes"):
        task(1).check([Row("a.png", Masks("a.png"))], "list.txt")
    with pytest.raises(InputError, match="b.png has no mask"):
        task().check([Row("b.png", None)], "list.txt")
    with pytest.raises(InputError, match="b.png has label 3 and no mask"):
        task().check([Row("b.png", 3)], "list.txt")
    config = Config(task="segmentation", model=ModelConfig(head="upernett"))
    with pytest.raises(InputError, match="task=segmentation has linear, upernet, atm"):
        build.build_model(config, 4)


def test_what_training_ignored_scoring_ignores():
    own = Config(task="segmentation", data=DataConfig(ignore_label=0))

    def label(asked, **changes):
        config = Config(task="segmentation", data=DataConfig(**changes))
        return scoring._with_checkpoint(config, own, asked).data.ignore_label

    assert label(set()) == 0
    assert label({"data.ignore_label"}) == IGNORED
    assert label(set(), ignore_label=7) == 7, "a recipe's"


@pytest.mark.parametrize("kind", ["segmentation", "detection", "action_detection"])
def test_a_checkpoint_with_a_head_has_one_view_unless_more_are_asked_for(kind):
    asked, own = resolve(Config()), resolve(Config(task=kind))
    ours = scoring._with_checkpoint(asked, own, set()).eval
    assert (ours.clips, ours.crops) == (own.eval.clips, own.eval.crops) == (1, 1)
    assert scoring._with_checkpoint(asked, own, {"eval.crops"}).eval.crops == asked.eval.crops == 3


def test_a_checkpoint_is_loaded_with_its_head(unbroken):
    config, names, model = load_model(unbroken / "last.pt")
    assert names == list(demo_scenes.CLASSES)
    assert type(model).__name__ == "LinearSegmenter"
    views = build.build_test_views(config, build.build_task(config, names), 1, 1)
    assert isinstance(views, MaskTestViews)
