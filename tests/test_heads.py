"""Models with a head on their grids: the seam that every task beside classification stands on."""

import pytest
import torch
from torch import Tensor, nn

from stvit_video.engine.optim import make_optimizer
from stvit_video.models import zoo
from stvit_video.models.heads import WithHead
from stvit_video.weights import WeightsError, load_weights

SIZES = {"num_frames": 1, "image_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2}
NAME = "stvit_tiny_patch16_224"


class PerPatch(WithHead):
    def __init__(self, backbone: nn.Module, num_classes: int):
        super().__init__(backbone, nn.Linear(backbone.blocks[0].norm1.weight.numel(), num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone.grids(x)[0])


@pytest.fixture(autouse=True)
def per_patch(monkeypatch):
    monkeypatch.setitem(zoo.HEADS, "per_patch", PerPatch)


def make(num_classes=5, **more):
    sizes = SIZES | {"base_depth": 1, "semantic_tokens": (1, 1, 1)} | more
    return zoo.create_model(NAME, num_classes=num_classes, **sizes)


def test_a_model_with_a_head_is_built_again_from_what_it_says():
    model = make(head="per_patch")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 2, 2, 5)
    again = zoo.create_model(**model.built)
    again.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(again.eval()(image), model.eval()(image))


def test_layers_below_a_head_decay_as_they_do_without_it():
    plain, headed = make(), make(head="per_patch")
    scales = []
    for model in (plain, headed):
        names = {id(p): name.removeprefix("backbone.") for name, p in model.named_parameters()}
        groups = make_optimizer(model, lr=1.0, betas=(0.9, 0.99), weight_decay=0.1, layer_decay=0.5)
        scales.append({names[id(p)]: g["lr_scale"] for g in groups.param_groups for p in g["params"]})
    assert scales[0] == scales[1]


def test_a_backbone_comes_in_under_a_fresh_head():
    donor, model = make(num_classes=7), make(head="per_patch")
    report = load_weights(model, donor.state_dict())
    assert set(report.dropped) == {"head.weight", "head.bias"}
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, donor.state_dict()[name])
    with pytest.raises(WeightsError, match="without what PerPatch has for a head"):
        load_weights(model, donor.state_dict(), fresh=())


def test_an_unknown_head_is_named():
    with pytest.raises(ValueError, match="unknown head 'per_pach'.*'per_patch'"):
        make(head="per_pach")
