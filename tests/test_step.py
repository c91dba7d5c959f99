"""STEP joined to segmentation: ATM and linear heads, exits, counts of tokens, the policy that is trained."""

import json

import pytest
import torch
from launch import finish, launch
from safetensors.torch import load_file
from test_end_to_end import assert_same, figures, run
from test_segmentation import SMALL, batch_of, scenes, task  # noqa: F401
from test_superpatches import NET, half_even, wave

from stvit_video import build, cli, create_model
from stvit_video.engine import checkpoint
from stvit_video.models.atm import Masks
from stvit_video.models.segmentation import Passed
from stvit_video.recognizer import load_model
from stvit_video.weights import WeightsError, load_weights

VIT = {"num_classes": 3, "num_frames": 1, "image_size": 32, "patch_size": (1, 8, 8), "embed_dim": 24}
VIT |= {"depth": 4, "num_heads": 2}
ATM = {"head": "atm", "head_dim": 12, "head_heads": 2, "head_layers": 1, "head_levels": 2}
LINEAR = {"head": "linear"}
HEADS = {
    "linear": LINEAR,
    "atm": ATM,
    "atm, atm exits": ATM | {"exit_head": "atm"},
}
DTOP = ATM | {"exit_head": "atm", "exits": [1, 2, 4]}
CONTRAST = {"superpatches": "contrast"}
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def segmenter(**sizes):
    """A model whose exits are confident enough to let tokens leave, whatever exits it has."""
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", **VIT | sizes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.6 if name.startswith("head.exits") else 0.1
            if "policy" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
        for name, parameter in model.named_parameters():
            if name.startswith("head.exits") and name.endswith("class_embed.bias"):
                parameter.copy_(torch.tensor([3.0, -3.0]))
    return model.eval()


def images(count=3):
    torch.manual_seed(3)
    return half_even(count)[:, :, :1]


def same_weights(model, plain):
    state = model.state_dict()
    plain.load_state_dict({k: state[k] for k in plain.state_dict()})
    return plain


@every_head
@pytest.mark.parametrize("merged", [{}, CONTRAST], ids=["patches", "superpatches"])
def test_with_threshold_1_it_is_the_plain_segmenter(head, merged):
    model = segmenter(**head, **merged, exits=[2, 3], exit_threshold=1.0)
    plain = same_weights(model, segmenter(**head, **merged, exits=[]))
    size, clips = (1, 32, 32), images()
    assert torch.equal(model.scores(model(clips), size), plain.scores(plain(clips), size))
    left = segmenter(**head, **merged, exits=[2, 3], exit_threshold=0.5)
    assert not torch.equal(left.scores(left(clips), size), plain.scores(plain(clips), size))
    targets = torch.randint(0, 3, (3, *size))
    ours, theirs = model.loss(model(clips), targets), plain.loss(plain(clips), targets)
    of_exits = sum(ours[f"exit_{layer}"] for layer in (2, 3))
    torch.testing.assert_close(ours["loss"] - of_exits, theirs["loss"])
