"""RandAugment is timm's, colours are torchvision's, wherever pixels are changed."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timms
from torchvision.transforms import InterpolationMode, v2

from stvit_video.data.augment import OPERATIONS, Draw, argument, augment, cut, draw_operations, together
from stvit_video.data.transforms import TrainTransform

CPU = torch.device("cpu")
SPACE = v2.RandAugment._AUGMENTATION_SPACE
MOVES = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}
# Where float32 sums are rounded to levels, clips together may differ from one by one by a level.
ROUNDED = {"ShearX", "ShearY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness"}
TIMMS = {  # their names
    **{name: f"{name}Increasing" for name in ("Posterize", "Solarize")},
    **{name: f"{name}Increasing" for name in ("Color", "Contrast", "Brightness", "Sharpness")},
    **{name: f"{name}Rel" for name in ("TranslateX", "TranslateY")},
}


def frames(seed=0, count=3, height=40, width=52):
    """A picture with edges, flat parts and all levels; each frame is another."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 300 * torch.rand(count, 3, 6, 8, generator=generator) - 20
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    smooth[..., 5:20, 5:20] = coarse[..., :1, :1]
    clip = smooth.clamp(0, 255).to(torch.uint8)
    clip[0, 0] = 77  # a plane of one level
    return clip.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("size", "flip"), [(24, True), (33, False)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_are_torchvisions(size, flip, interpolation):
    transform = TrainTransform(size, flip=flip, interpolation=interpolation)
    mode = InterpolationMode(interpolation)
    crop = v2.RandomResizedCrop(size, scale=(0.08, 1.0), ratio=(0.75, 4 / 3), interpolation=mode)
    for seed in range(25):
        clip = frames(seed)
        torch.manual_seed(seed)
        expected = crop(clip)
        if flip and torch.rand(()) < 0.5:
            expected = v2.functional.horizontal_flip(expected)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(transform(clip, 0)[0], expected)
        assert torch.equal(torch.get_rng_state(), state)  # so that the next clip's are, too


def test_operations_are_timms():
    names = [TIMMS.get(name, name) for name in OPERATIONS]
    assert sorted(names) == sorted(timms._RAND_INCREASING_TRANSFORMS)
    (operation, *_) = timms.rand_augment_transform("rand-m7-n4-mstd0.5-inc1", {}).ops
    assert (operation.prob, operation.magnitude_std, operation.magnitude) == (0.5, 0.5, 7)


def test_half_of_the_operations_are_applied_with_noise_on_the_magnitude():
    drawn = [draw_operations(4, 7, (100, 200)) for _ in range(3000)]
    names = Counter(name for operations in drawn for name, _ in operations)
    assert names.total() / 12_000 == pytest.approx(0.5, abs=0.02)
    assert all(count / 6000 == pytest.approx(1 / 15, abs=0.015) for count in names.values())
    assert len(names) == 15
    turns = torch.tensor([value for operations in drawn for name, value in operations if name == "Rotate"])
    levels = turns.abs() / 3
    assert levels.mean().item() == pytest.approx(7, abs=0.1)
    assert levels.std().item() == pytest.approx(0.5, abs=0.08)
    assert (turns > 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert draw_operations(0, 7, (100, 200)) == ()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_an_operation_takes_is_timms(name, sign, monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 0.0 if sign > 0 else 1.0)
    theirs = timms.LEVEL_TO_ARG[TIMMS.get(name, name)]
    for level in (0.0, 2.2, 5.0, 7.0, 7.77, 10.0):
        (expected,) = (0,) if theirs is None else theirs(level, {})
        if name.startswith("Translate"):  # theirs is a share of the frame
            expected = round(expected * {"TranslateX": 340, "TranslateY": 256}[name])
        assert argument(name, level, sign, (256, 340)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", OPERATIONS)
def test_pixels_are_timms(name):
    """PIL's: colours within two levels; what moves, too, but for the edge that it blends otherwise."""
    clip = frames(3, count=1, height=60, width=90).contiguous()
    picture = Image.fromarray(clip[0].permute(1, 2, 0).numpy())
    how = {"resample": Image.Resampling.BILINEAR, "fillcolor": (128, 128, 128)}
    for level, sign in ((2.0, 1), (7.0, -1), (10.0, 1)):
        value = argument(name, level, sign, (60, 90))
        args = [] if timms.LEVEL_TO_ARG[TIMMS.get(name, name)] is None else [value]
        if name.startswith("Translate"):  # a share of the frame, to the other side
            args = [-value / {"TranslateX": 90, "TranslateY": 60}[name]]
        expected = timms.NAME_TO_OP[TIMMS.get(name, name)](picture, *args, **how)
        expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
        far = (OPERATIONS[name]([value], (60, 90), CPU)(clip[None])[0, 0].int() - expected.int()).abs()
        if name in MOVES:
            assert (far.amax(0) > 2).float().mean() < 0.06
            assert far.float().mean() < 1.5
        else:
            assert far.max() <= 2


@pytest.mark.parametrize("name", SPACE.keys() - MOVES - {"Identity"})
def test_colours_are_torchvisions_at_every_magnitude(name):
    levels, signed = SPACE[name]
    theirs = v2.RandAugment(interpolation=InterpolationMode.BILINEAR)
    for size in ((24, 24), (33, 20)):
        clip, magnitudes = frames(1, height=size[0], width=size[1]).contiguous(), levels(11, *size)
        magnitudes = [0.0] if magnitudes is None else magnitudes.tolist()
        for magnitude in magnitudes + [-m for m in magnitudes if signed]:
            expected = theirs._apply_image_or_video_transform(
                clip, name, magnitude, InterpolationMode.BILINEAR, {}
            )
            value = 1 + magnitude
            if name == "Posterize":
                value = int(magnitude)
            if name == "Solarize":  # theirs is compared in float32
                value = int(np.ceil(np.float32(255 * magnitude)))
            out = OPERATIONS[name]([value], size, CPU)(clip[None])[0]
            assert torch.equal(out, expected), magnitude


def test_operations_see_the_frame_and_not_only_the_crop():
    clip = frames(2)
    clip[:, :, 0, 0], clip[:, :, 10:30, 10:30] = 255, (clip[:, :, 10:30, 10:30] // 4)
    draw = Draw((10, 10, 20, 20), 16, (40, 52), (("AutoContrast", 0), ("TranslateX", 5)), flip=True)
    out = torch.empty(3, 3, 16, 16, dtype=torch.uint8)
    augment(cut(clip, draw), draw, out)
    moved = torch.full_like(clip, 128)
    moved[..., 5:] = v2.functional.autocontrast(clip)[..., :-5]
    expected = v2.functional.resized_crop(moved, 10, 10, 20, 20, [16, 16], antialias=True).flip(-1)
    assert torch.equal(out.transpose(0, 1), expected)


def test_large_frames_are_made_smaller_for_randaugment_alone():
    large = torch.randint(256, (2, 3, 100, 150), dtype=torch.uint8)
    transform = TrainTransform(28, rand_augment=(1, 7))  # short sides of 40
    assert torch.equal(transform.prepare(large), v2.functional.resize(large, [40], antialias=True))
    small = large[..., :40, :]
    assert transform.prepare(small) is small
    assert TrainTransform(28).prepare(large) is large


@pytest.mark.parametrize("name", OPERATIONS)
def test_clips_that_drew_an_operation_go_through_it_together(name):
    """Each by what it drew, beside ones of another size or operation, and of none; then crop and flip."""
    draws = []
    for i, level in enumerate((7, 2, 10, 7)):
        size = (40, 52) if i < 3 else (36, 44)
        operations = (("Posterize", 2), (name, argument(name, level, (-1) ** i, size)))
        draws.append(Draw((2 * i, i, 20 + i, 30 - i), 24, size, operations, i % 2 == 1))
    draws.append(Draw((0, 0, 40, 52), 24, (40, 52), (("Solarize", 130),)))
    draws.append(Draw((5, 5, 30, 40), 24, (40, 52)))
    clips = [
        cut(frames(i, height=draw.frame[0], width=draw.frame[1]), draw) for i, draw in enumerate(draws)
    ]
    out = together(clips, draws)
    for clip, draw, pixels in zip(clips, draws, out, strict=True):
        expected = torch.empty(3, 3, 24, 24, dtype=torch.uint8)
        augment(clip, draw, expected)
        far = (pixels.transpose(0, 1).int() - expected.int()).abs().max()
        assert far <= (name in ROUNDED)
