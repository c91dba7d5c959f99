"""The baselines give logits, and are pytorchvideo's own models: hub weights, hub outputs."""

import pytest
import torch

from stvit_video import create_model
from stvit_video.models.baselines import ptv_mvit_base_16x4, ptv_slowfast_r50, ptv_x3d_m

CLASSES = 5
# Frames and image size: small, and for the convolutional ones not a multiple of the total stride.
SMALL = {ptv_mvit_base_16x4: (4, 36), ptv_x3d_m: (3, 40), ptv_slowfast_r50: (8, 40)}


@pytest.fixture(scope="module", params=SMALL, ids=lambda build: build.__name__)
def small(request):
    """A small model of each kind and a batch of two clips of its size."""
    num_frames, image_size = SMALL[request.param]
    torch.manual_seed(0)
    model = request.param(num_classes=CLASSES, num_frames=num_frames, image_size=image_size)
    return model, torch.randn(2, 3, num_frames, image_size, image_size)


def run(model, clip):
    """The model's output with the random state (dropout) of seed 0, without gradients."""
    torch.manual_seed(0)
    with torch.no_grad():
        return model(clip)


def load_hub(model, hub):
    """The hub model's weights into ours, strictly: one prefix, and not a name more or less."""
    model.load_state_dict({f"net.{name}": value for name, value in hub.state_dict().items()})


@pytest.mark.parametrize("training", [False, True])
def test_output_is_logits(small, training):
    """Raising the head's bias by 3 raises every output by 3; a softmax would not notice."""
    model, clip = small
    model.train(training)
    name, bias = list(model.named_parameters())[-1]
    assert name.endswith("proj.bias")
    logits = run(model, clip)
    assert logits.shape == (2, CLASSES)
    assert ((logits.sum(1) - 1).abs() > 1e-3).all()
    with torch.no_grad():
        bias += 3
        raised = run(model, clip)
        bias -= 3
    torch.testing.assert_close(raised, logits + 3)


def test_every_parameter_gets_a_gradient(small):
    model, clip = small
    model.train().zero_grad()
    torch.nn.functional.cross_entropy(model(clip), torch.tensor([0, 1])).backward()
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lost == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_clip_of_another_shape_is_refused(small):
    model, clip = small
    for other in (clip[:, :2], clip[:, :, :-1], clip[..., :-1], clip[..., :-1, :], clip[0]):
        with pytest.raises(ValueError, match="made for") as caught:
            model(other)
        assert str(tuple(other.shape)) in str(caught.value)
        assert str(tuple(clip.shape[1:])) in str(caught.value)


def test_x3d_softmax_is_the_hub_output():
    """At the one size that the hub's model takes. Its softmax is there in training too."""
    from pytorchvideo.models.hub import x3d_m

    torch.manual_seed(0)
    hub = x3d_m(model_num_class=CLASSES).eval()
    model = ptv_x3d_m(num_classes=CLASSES).eval()
    load_hub(model, hub)
    clip = torch.randn(1, 3, 16, 224, 224)
    torch.testing.assert_close(run(model, clip).softmax(1), run(hub, clip))


def test_slowfast_is_the_hub_model():
    """At a small size by its logits; at its own, too slow to run here, layer for layer."""
    from pytorchvideo.models.hub import slowfast_r50

    torch.manual_seed(0)
    pools = ((2, 2, 2), (8, 2, 2))
    hub = slowfast_r50(model_num_class=CLASSES, head_pool_kernel_sizes=pools).eval()
    model = ptv_slowfast_r50(num_classes=CLASSES, num_frames=8, image_size=40).eval()
    load_hub(model, hub)
    clip = torch.randn(2, 3, 8, 40, 40)
    torch.testing.assert_close(run(model, clip), run(hub, [clip[:, :, [0, 7]], clip]))
    assert repr(model.net) == repr(hub)  # in eval mode the logits do not tell a smaller pool

    model = ptv_slowfast_r50(num_classes=CLASSES, num_frames=32, image_size=224)
    hub = slowfast_r50(model_num_class=CLASSES)
    load_hub(model, hub)
    assert repr(model.net) == repr(hub)
    assert model.slow_frames.tolist() == [0, 4, 8, 13, 17, 22, 26, 31]


def test_mvit_is_the_hub_model():
    from pytorchvideo.models.hub import mvit_base_16x4

    torch.manual_seed(0)
    hub = mvit_base_16x4(temporal_size=4, spatial_size=64, head_num_classes=CLASSES).eval()
    model = ptv_mvit_base_16x4(num_classes=CLASSES, num_frames=4, image_size=64).eval()
    load_hub(model, hub)
    clip = torch.randn(1, 3, 4, 64, 64)
    assert torch.equal(run(model, clip), run(hub, clip))


def test_mvit_standard_size_has_the_hub_layers():
    from pytorchvideo.models.hub import mvit_base_16x4

    model, hub = ptv_mvit_base_16x4(num_classes=400), mvit_base_16x4()
    load_hub(model, hub)
    assert repr(model.net) == repr(hub)


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        (ptv_mvit_base_16x4, {"num_frames": 5}),
        (ptv_mvit_base_16x4, {"num_frames": 0}),
        (ptv_mvit_base_16x4, {"image_size": 30}),
        (ptv_x3d_m, {"image_size": 31}),
        (ptv_x3d_m, {"num_frames": 0}),
        (ptv_x3d_m, {"image_size": (64, 64)}),
        (ptv_slowfast_r50, {"num_frames": 6}),
        (ptv_slowfast_r50, {"image_size": 224.0}),
        (ptv_slowfast_r50, {"num_classes": 0}),
    ],
)
def test_a_size_the_model_cannot_take_is_refused(build, sizes):
    [(name, value)] = sizes.items()
    with pytest.raises(ValueError, match="must (be|lie)") as caught:
        create_model(build.__name__, **{"num_classes": CLASSES} | sizes)
    assert f"{name}={value!r}" in str(caught.value)
