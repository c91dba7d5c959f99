"""Pixels are torchvision's, drawn as torchvision draws, wherever they are changed."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from stvit_video.data.augment import OPERATIONS, Draw, augment, cut, together
from stvit_video.data.transforms import TrainTransform

CPU = torch.device("cpu")
SPACE = v2.RandAugment._AUGMENTATION_SPACE
# Where float32 sums are rounded to levels, clips together may differ from one by one by a level.
ROUNDED = {"ShearX", "ShearY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness"}

# Of seeds 0 to 2: box, flip, operations.
RECORDED = [
    ((38, 24, 200, 233), True, ["ShearX", "Equalize", "TranslateX", "Rotate"]),
    ((7, 49, 185, 212), True, ["Color", "Color", "TranslateY", "AutoContrast"]),
    ((5, 72, 245, 229), True, ["TranslateY", "Brightness", "TranslateY", "ShearY"]),
]
MAGNITUDES = {"ShearX": 0.21, "Equalize": 0.0, "TranslateX": -71.0574036, "Rotate": -21.0}


def frames(seed=0, count=3, height=40, width=52):
    """A picture with edges, flat parts and all levels; each frame is another."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 300 * torch.rand(count, 3, 6, 8, generator=generator) - 20
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    smooth[..., 5:20, 5:20] = coarse[..., :1, :1]
    clip = smooth.clamp(0, 255).to(torch.uint8)
    clip[0, 0] = 77  # a plane of one level
    return clip.contiguous(memory_format=torch.channels_last)


def by_torchvision(clip, size, operations, magnitude, flip):
    clip = v2.RandomResizedCrop(size, scale=(0.08, 1.0), ratio=(0.75, 4 / 3))(clip)
    if operations:
        bilinear = InterpolationMode.BILINEAR
        clip = v2.RandAugment(operations, magnitude, num_magnitude_bins=11, interpolation=bilinear)(clip)
    return v2.functional.horizontal_flip(clip) if flip and torch.rand(()) < 0.5 else clip


@pytest.mark.parametrize("options", [(24, 4, 7, True), (33, 2, 10, False), (16, 0, 0, True)])
def test_clips_are_torchvisions(options):
    size, operations, magnitude, flip = options
    transform = TrainTransform(
        size, rand_augment=(operations, magnitude) if operations else None, flip=flip
    )
    for seed in range(25):
        clip = frames(seed)
        torch.manual_seed(seed)
        expected = by_torchvision(clip, *options)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(transform(clip, 0)[0], expected)
        assert torch.equal(torch.get_rng_state(), state)  # so that the next clip's are, too


def test_draws_are_those_of_earlier_versions():
    transform = TrainTransform(224, rand_augment=(4, 7), flip=True)
    draws = [
        torch.manual_seed(seed) and transform.draw(torch.empty(1, 3, 256, 340), 0) for seed in range(3)
    ]
    assert [(draw.box, draw.flip, [name for name, _ in draw.operations]) for draw in draws] == RECORDED
    assert dict(draws[0].operations) == pytest.approx(MAGNITUDES, abs=1e-6)


@pytest.mark.parametrize("name", SPACE)
def test_each_operation_is_torchvisions_at_every_magnitude(name):
    levels, signed = SPACE[name]
    theirs = v2.RandAugment(interpolation=InterpolationMode.BILINEAR)
    for size in (24, 33):
        clip, magnitudes = frames(1, height=size, width=size).contiguous(), levels(11, size, size)
        magnitudes = [0.0] if magnitudes is None else magnitudes.tolist()
        for magnitude in magnitudes + [-m for m in magnitudes if signed]:
            expected = theirs._apply_image_or_video_transform(
                clip, name, magnitude, InterpolationMode.BILINEAR, {}
            )
            out = OPERATIONS[name]([magnitude], size, CPU)(clip[None])[0]
            assert torch.equal(out, expected), magnitude


@pytest.mark.parametrize("name", SPACE)
def test_clips_that_drew_an_operation_go_through_it_together(name):
    """Each by its own magnitude, beside one that drew another operation; then the flip."""
    levels, signed = SPACE[name]
    magnitudes = levels(11, 24, 24)
    drawn = [0.0] * 4 if magnitudes is None else [float(magnitudes[i]) for i in (7, 2, 10, 7)]
    drawn[-1] *= -1 if signed else 1
    draws = [
        Draw((2 * i, i, 20 + i, 30 - i), 24, (("Posterize", 6.0), (name, value)), i % 2 == 1)
        for i, value in enumerate(drawn)
    ]
    draws.append(Draw((0, 0, 40, 52), 24, (("Solarize", 0.5), ("Identity", 0.0))))
    clips = [cut(frames(i), draw) for i, draw in enumerate(draws)]
    out = together(clips, draws)
    for clip, draw, pixels in zip(clips, draws, out, strict=True):
        expected = torch.empty(3, 3, 24, 24, dtype=torch.uint8)
        augment(clip, draw, expected)
        far = (pixels.transpose(0, 1).int() - expected.int()).abs().max()
        assert far <= (name in ROUNDED)
