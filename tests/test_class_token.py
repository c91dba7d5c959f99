"""The class token: by value against timm, with every reducer, and never on a grid."""

import pytest
import timm
import torch
from test_models import CLIP, TINY
from test_tokens import GRID, PLANS, merged, model_of

from stvit_video import create_model, multiply_adds
from stvit_video.models.tokens import Tokens, batch
from stvit_video.weights import WeightsError, load_weights

every_plan = pytest.mark.parametrize("plan", [None, *PLANS])


@pytest.fixture
def clip():
    return torch.randn(2, 3, 4, 32, 32)


@pytest.mark.parametrize("sizes", [{}, {"init_values": 0.3}, {"init_values": 0.3, "no_embed_class": True}])
def test_timm_with_a_class_token(sizes):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=3, img_size=64, **sizes).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    sizes = {"num_classes": 7, "num_frames": 1, "image_size": 64, "depth": 3}
    ours = create_model("vit_tiny_patch16_224", class_token=True, **sizes).eval()
    report = load_weights(ours, theirs.state_dict(), fresh=())
    assert not [name for name in report.dropped if "cls" in name or "pos" in name]
    image = torch.randn(2, 3, 64, 64)
    assert (ours(image) - theirs(image)).abs().max() <= 1e-5
    load_weights(
        ours, create_model("vit_tiny_patch16_224", class_token=True, **sizes).state_dict(), fresh=()
    )
    with pytest.raises(WeightsError, match="missing     cls_token"):
        load_weights(ours, create_model("vit_tiny_patch16_224", **sizes).state_dict())
    plain = create_model("vit_tiny_patch16_224", **sizes)
    assert load_weights(plain, ours.state_dict()).dropped.keys() == {"cls_token", "pos_embed_class"}


@every_plan
def test_it_goes_from_end_to_end(plan, clip):
    model = model_of(plan, class_token=True).eval()
    layers = list(model._layers(clip))
    for _, tokens in layers:
        assert tokens.class_token.shape == (2, 1, 24)
        assert tokens.to_grid().shape == (2, *GRID, 24)
        assert tokens.sizes().sum(1).tolist() == [32, 32]
    assert model.pooled_features(clip).equal(model.fc_norm(layers[-1][1].class_token[:, 0]))
    assert layers[-1][1].x.shape == model_of(plan).tokens(clip).x.shape
    model.zero_grad()
    model(clip).square().sum().backward()
    model.tokens(clip).to_grid().square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_plan
def test_it_is_asked_and_asks(plan, clip):
    """What changes the class token alone reaches the patches; without it they are a plain model's."""
    model = model_of(plan, class_token=True).eval()
    before, features = model.tokens(clip).x, model.pooled_features(clip)
    torch.nn.init.normal_(model.cls_token)
    assert not model.tokens(clip).x.allclose(before)
    assert not model.pooled_features(clip + 1).allclose(model.pooled_features(clip))
    assert not features.allclose(model.pooled_features(clip))


@every_plan
def test_a_padded_batch_is_each_clip_alone(plan):
    model = model_of(plan, class_token=True).eval()
    clips = [merged(n)._replace(class_token=torch.randn(1, 1, 24)) for n in (32, 29, 12, 1)]
    padded = batch(clips)
    for reducer, used, rest in model.segments:
        for block in rest if reducer is None else [None, *rest]:
            if block is None:
                padded, clips = reducer(padded, used), [reducer(tokens, used) for tokens in clips]
                continue
            padded = padded.with_sequence(block(padded.sequence(), bias=padded.bias()))
            clips = [t.with_sequence(block(t.sequence(), bias=t.bias())) for t in clips]
    for i, tokens in enumerate(clips):
        torch.testing.assert_close(padded.pooled()[i : i + 1], tokens.pooled())
        torch.testing.assert_close(padded.to_grid()[i : i + 1], tokens.to_grid())


def test_it_stays_where_tokens_leave():
    tokens = Tokens.of(torch.randn(2, *GRID, 24))._replace(class_token=torch.randn(2, 1, 24))
    fewer = tokens.leave(torch.rand(2, 32) < torch.tensor([[0.2], [0.8]]))
    assert fewer.class_token is tokens.class_token
    assert fewer.bias().shape == (2, 1, 1, 1 + fewer.x.shape[1])
    assert not fewer.bias()[..., 0].any()
    assert fewer.to_grid().equal(tokens.to_grid())


@pytest.mark.parametrize("plan", [None, "semantic", "tome"])
def test_it_exports(plan, clip):
    model = model_of(plan, class_token=True).eval()
    program = torch.export.export(
        model, (clip,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    )
    other = torch.randn(3, 3, 4, 32, 32)
    torch.testing.assert_close(program.module()(other), model(other))


@every_plan
def test_it_belongs_to_the_embedding(plan):
    from timm.models import group_parameters

    model = model_of(plan, class_token=True)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["cls_token"] == groups["pos_embed_class"] == groups["pos_embed"]
    assert {"cls_token", "pos_embed_class"} <= model.no_weight_decay()


def test_the_maps_of_semantic_tokens_are_theirs_alone(clip):
    maps = model_of("semantic", class_token=True).eval().semantic_maps(clip)
    assert maps.shape == (2, 12, *GRID)
    torch.testing.assert_close(maps.sum((2, 3, 4)), torch.ones(2, 12))


def test_it_costs_one_token():
    costs = [
        multiply_adds(
            create_model("vit_tiny_patch16_224", **CLIP, **TINY, class_token=token),
            num_frames=4,
            image_size=32,
        )
        for token in (False, True)
    ]
    token = 12 * 24**2 + 2 * 24 * (2 * 32 + 1)  # of a layer: its matrices, and its scores both ways
    assert costs[1] - costs[0] == TINY["depth"] * token
