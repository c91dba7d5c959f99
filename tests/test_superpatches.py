"""Superpatches: by value against CTS; what is merged, what comes back, and that nothing else changes."""

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_models import CLIP, TINY
from torch import nn

from stvit_video import create_model, multiply_adds
from stvit_video.build import build_model
from stvit_video.config import make_parser, parse, resolve
from stvit_video.engine.checkpoint import FORMAT
from stvit_video.models import superpatches
from stvit_video.models.superpatches import (
    PolicyNet,
    Superpatches,
    agreement_targets,
    fewest_tokens,
    fitting_shapes,
    group_members,
    group_targets,
    policy_loss,
)
from stvit_video.models.tokens import Tokens
from stvit_video.weights import WeightsError, load_weights

ROOT = Path(__file__).parents[1]
GRID, PATCHES = (2, 4, 4), 32
NET = "test_efficientnet"
DECIDERS = {
    "contrast": {"superpatches": "contrast"},
    "dcts": {"superpatches": "dcts", "superpatch_policy": NET},
}
every_decider = pytest.mark.parametrize("decider", DECIDERS)


def wave(*shape):
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return ((0.0137 * i).sin() + 0.5 * (0.00071 * i + 0.3).cos()).float().view(shape)


def scattered(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def vit(name="vit_tiny_patch16_224", **sizes):
    torch.manual_seed(0)
    return scattered(create_model(name, **CLIP | TINY | sizes)).eval()


def half_even(count=2):
    """Clips whose left half is even, whose right half is noise; each has more noise than the one before."""
    clips = torch.zeros(count, 3, 4, 32, 32)
    for i, clip in enumerate(clips):
        clip[..., 8 * (count - i) :] = torch.randn_like(clip[..., 8 * (count - i) :])
    return clips


# ---- CTS


class FixedLogits(nn.Module):
    def __init__(self, *logits):
        super().__init__()
        self.logits = logits

    def forward(self, clip):
        return list(self.logits)


@pytest.fixture(scope="module")
def cts():
    """The file's values, and a model with its weights that shares as its policy says."""
    values = load_file("tests/fixtures/cts_linear_64x96.safetensors")
    sizes = {"num_classes": 5, "num_frames": 1, "image_size": (64, 96), "patch_size": (1, 16, 16)}
    sizes |= {"embed_dim": 24, "depth": 2, "num_heads": 2, "class_token": True}
    model = create_model(
        "vit_tiny_patch16_224",
        **sizes,
        **DECIDERS["dcts"],
        superpatch_tokens=18,
        superpatch_shapes=[(1, 2, 2)],
        superpatch_vectors=False,
    ).eval()
    model.superpatches.policy = None
    state = {k.removeprefix("w.encoder."): t for k, t in values.items() if k.startswith("w.encoder.")}
    state = {k: t for k, t in state.items() if not k.startswith("head.")}
    state |= {f"head.{k}": values[f"w.decoder.head.{k}"] for k in ("weight", "bias")}
    table = state["pos_embed"]  # flat, and not of a square: taken as a grid
    state["pos_embed"] = table[:, 1:].unflatten(1, (1, 4, 6))
    state |= {"pos_embed_class": table[:, :1], "fc_norm.weight": state.pop("norm.weight")}
    load_weights(model, state | {"fc_norm.bias": state.pop("norm.bias")}, fresh=())
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    model.superpatches.policy = FixedLogits(values["in.policy_logits"][:, :, None])
    return values, model, wave(1, 3, 64, 96)


def test_cts_by_value(cts):
    values, model, image = cts
    tokens = model.embed(image)
    sizes = tokens.sizes()[0].tolist()
    assert sizes == [1] * 16 + [4, 4]
    first = [tokens.places()[0].tolist().index(i) for i in range(18)]  # a token's top left patch
    codes = [[size**0.5, i // 6, i % 6] for size, i in zip(sizes, first, strict=True)]
    assert codes == values["out.policy_code"][0].tolist()
    scores = model.superpatches.scores(image[:, :, None])[0]
    assert (scores - values["out.group_scores"].flatten(1)).abs().max() <= 2e-5
    plain = tokens.x - model.superpatches._positions(model.pos_embed)[order_of(tokens)]
    assert (plain - values["out.patch_tokens"]).abs().max() <= 2e-5
    assert (tokens.sequence() - values["out.tokens_embed"]).abs().max() <= 2e-5
    last = model.tokens(image)
    normed = model.fc_norm(last.sequence())
    assert (normed - values["out.encoder"]).abs().max() <= 2e-5
    logits = last._replace(x=model.head(model.fc_norm(last.x)))
    assert (logits.x - values["out.token_logits"]).abs().max() <= 2e-5
    grid = logits.to_grid()[:, 0].movedim(-1, 1)
    assert (grid - values["out.grid_logits"]).abs().max() <= 2e-5
    full = nn.functional.interpolate(grid, (64, 96), mode="bilinear")
    assert (full[..., ::4, ::4] - values["out.logits"]).abs().max() <= 2e-5
    assert full.argmax(1).flatten().bincount(minlength=5).tolist() == [3190, 451, 2330, 173, 0]


def order_of(tokens):
    """Which patch (or after them, which group of 2x2) each token of the only clip is."""
    singles = tokens.sizes()[0] == 1
    first = torch.tensor([tokens.places()[0].tolist().index(i) for i in range(len(singles))])
    return torch.where(singles, first, 24 + first // 12 * 3 + first % 6 // 2)


RULES = {  # whether label 0 is read as ignored, and the ring's rule
    "ade20k": (True, True),
    "cityscapes": (False, False),
    "pcontext": (True, False),
}


@pytest.mark.parametrize("rule", RULES)
def test_targets_and_loss_by_value(rule):
    values = load_file("tests/fixtures/cts_policy_targets.safetensors")
    zero_is_ignored, border = RULES[rule]
    labels = values["in.label"][None].long()
    if zero_is_ignored:
        labels = labels.masked_fill(labels == 0, 255)
    (target,) = group_targets(labels, [(1, 2, 2)], (1, 16, 16), unsure_at_border=border)
    assert target[:, 0].equal(values[f"out.target_{rule}"][None].long())
    loss = policy_loss([values["in.logits"][:, :, None]], [target])
    assert loss.item() == pytest.approx(values["out.loss"][list(RULES).index(rule)].item(), abs=2e-5)


def test_targets_of_all_sizes_are_even_groups():
    labels = torch.zeros(2, 4, 32, 32).long()
    labels[0, 2:, :, 16:] = 3
    labels[1, :, 0, 0] = 255
    shapes = [(2, 4, 4), (2, 2, 2), (1, 2, 2), (2, 1, 1)]
    for shape, target in zip(shapes, group_targets(labels, shapes, (2, 8, 8)), strict=True):
        members = torch.tensor(group_members(GRID, shape))
        pixels = labels.view(2, 2, 2, 4, 8, 4, 8).permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        groups = pixels[:, members].flatten(2)
        assert target.flatten(1).equal((groups == groups[..., :1]).all(-1).long())
    nothing = [torch.full((1, 1, 1, 1), 255)]
    assert policy_loss([torch.randn(1, 2, 1, 1, 1)], nothing) == 0


def test_where_there_are_no_labels_patches_that_agree_are_a_group():
    grid = torch.zeros(1, *GRID, 3)
    grid[..., 0] = 1
    grid[0, 0, 0, 0] = torch.tensor([1.0, 0.2, 0.0]) * 7  # nearly the others' direction, another length
    grid[0, 1, 2:, 2:, 1] = torch.arange(4).view(2, 2).float()
    grid = grid.expand(2, -1, -1, -1, -1)
    large, small = agreement_targets(grid, [(2, 2, 2), (1, 2, 2)], threshold=0.9)
    assert large[1].tolist() == [[[1, 1], [1, 0]]]
    assert small[0].tolist() == [[[1, 1], [1, 1]], [[1, 1], [1, 0]]]
    assert agreement_targets(grid, [(1, 2, 2)], threshold=0.999)[0][0, 0].tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize("name", [NET, "lcnet_050"])
def test_norms_are_folded_into_convolutions_and_change_no_score(name, monkeypatch):
    policy, image = PolicyNet((1, 16, 16), [(1, 4, 4), (1, 2, 2)], name), torch.randn(2, 3, 64, 64)
    norms = [module for module in policy.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        for values in (norm.weight, norm.bias, norm.running_mean):
            nn.init.uniform_(values, 0.5, 1.5)
    plain = copy.deepcopy(policy)
    for module in plain.modules():
        vars(module).pop("forward", None)
    for ours, theirs in zip(policy(image), plain(image), strict=True):  # in training, as it was
        assert ours.equal(theirs)
    assert all(torch.equal(a, plain.state_dict()[k]) for k, a in policy.state_dict().items())
    expected = plain.eval()(image)
    monkeypatch.setattr(nn.functional, "batch_norm", None)
    for ours, theirs in zip(policy.eval()(image), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError):
        plain(image)


# ---- which groups


def test_groups_partition_what_they_fill():
    assert group_members((1, 2, 4), (1, 2, 2)).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    for grid, shape in (((2, 5, 7), (2, 2, 3)), ((4, 4, 4), (2, 1, 2))):
        members = group_members(grid, shape)
        count = [n // s for n, s in zip(grid, shape, strict=True)]
        assert members.shape == (math.prod(count), math.prod(shape))
        assert len(set(members.flatten().tolist())) == members.size
    assert fitting_shapes((1, 32, 20)) == [(1, 16, 16), (1, 8, 8), (1, 4, 4), (1, 2, 2)]
    assert fitting_shapes((1, 7, 7)) == [(1, 4, 4), (1, 2, 2)]
    assert fewest_tokens((1, 7, 7), [(1, 4, 4), (1, 2, 2)]) == 1 + 5 + 13


@every_decider
def test_the_fewest_tokens_of_an_even_clip(decider):
    model = vit(**DECIDERS[decider])
    clip = torch.full((2, 3, 4, 32, 32), 0.7)
    if decider == "dcts":
        for head in model.superpatches.policy.heads:
            nn.init.zeros_(head.weight)
            head.bias.data.copy_(torch.tensor([0.0, 9.0]))
    tokens = model.embed(clip)
    assert tokens.x.shape[1] == fewest_tokens(GRID, model.superpatches.shapes) == 4
    assert tokens.asked is None
    assert tokens.sizes().tolist() == [[8.0] * 4] * 2


def test_the_largest_group_that_is_even_enough():
    model = vit(superpatches="contrast", superpatch_shapes=[(2, 2, 2), (1, 2, 2), (2, 1, 1)])
    clip = torch.zeros(1, 3, 4, 32, 32)
    clip[:, :, 1::2, :16, 16:] = 1  # the right upper block changes over time, the left lower over space
    clip[:, :, :, 16:, :16] = torch.randn(1, 3, 1, 16, 16)
    tokens = model.embed(clip)
    token = tokens.places().view(GRID)
    assert tokens.sizes()[0][token[:, :2, :2]].eq(8).all()
    assert tokens.sizes()[0][token[:, :2, 2:]].eq(4).all()
    assert tokens.sizes()[0][token[:, 2:, :2]].eq(2).all()
    assert tokens.sizes()[0][token[:, 2:, 2:]].eq(8).all()
    assert tokens.sizes()[0].tolist() == [8, 8, 4, 4, 2, 2, 2, 2]


def test_contrast_is_in_units_of_0_to_1():
    std = (0.2, 0.3, 0.5)
    model = vit(superpatches="contrast", superpatch_std=std, superpatch_shapes=[(1, 2, 2)])
    pixels = torch.rand(2, 3, 4, 32, 32)
    clip = (pixels - 0.4) / torch.tensor(std).view(3, 1, 1, 1)
    rows = model.superpatches._pixels(clip, (2, 8, 8))
    (scores,) = model.superpatches.scores(clip, rows)
    blocks = pixels.view(2, 3, 4, 16, 2, 16, 2)
    error = (blocks - blocks.mean((4, 6), keepdim=True)).square()
    error = error.view(2, 3, 2, 2, 2, 16, 2, 16).mean((1, 3, 5, 7)).flatten(1).sqrt()
    torch.testing.assert_close(-scores, error, atol=1e-4, rtol=1e-4)


def test_the_policy_looks_at_each_group():
    """Where a clip changes, logits change there first; every shape has a cell for each of its groups."""
    shapes = [(1, 8, 8), (1, 4, 4), (1, 2, 2)]
    policy = PolicyNet((1, 16, 16), shapes, NET).eval()
    assert [policy.strides[level] for level in policy.levels] == [32, 32, 32]
    image = torch.randn(2, 3, 160, 208)
    logits = policy(image)
    assert [tuple(x.shape) for x in logits] == [(2, 2, 1, 1, 1), (2, 2, 1, 2, 3), (2, 2, 1, 5, 6)]
    features = policy.backbone(image)[-1]
    for x, head, k in zip(logits[1:], policy.heads[1:], (2, 1), strict=True):
        h, w = x.shape[3:]
        cells = nn.functional.avg_pool2d(features[..., : h * k, : w * k], k).movedim(1, -1)
        torch.testing.assert_close(x[:, :, 0], head(cells).movedim(-1, 1))
    fine = PolicyNet((2, 8, 8), [(2, 4, 4), (1, 2, 2), (2, 1, 1)], NET).eval()
    assert [fine.strides[level] for level in fine.levels] == [32, 16, 8]
    clip = torch.randn(2, 3, 4, 32, 32)
    assert [tuple(x.shape[2:]) for x in fine(clip)] == [(1, 1, 1), (2, 2, 2), (1, 4, 4)]


def test_cts_names_fit_the_policy():
    policy = PolicyNet((1, 16, 16), [(1, 2, 2)])
    assert sum(p.numel() for p in policy.parameters()) == 2959490
    assert policy.heads[0].weight.shape == (2, 320)
    assert {name.partition(".")[0] for name in policy.state_dict()} == {"backbone", "heads"}


# ---- what comes of them


@every_decider
@pytest.mark.parametrize("sizes", [{}, {"class_token": True}])
def test_with_nothing_merged_it_is_the_plain_model(decider, sizes):
    plain, clip = vit(**sizes), torch.randn(2, 3, 4, 32, 32)
    for budget in (
        {"superpatch_threshold": 0 if decider == "contrast" else 1},
        {"superpatch_tokens": PATCHES},
    ):
        model = vit(**sizes, **DECIDERS[decider], **budget)
        model.load_state_dict(plain.state_dict(), strict=False)
        assert model(clip).equal(plain(clip))
        assert model.grids(clip)[0].equal(plain.grids(clip)[0])


@every_decider
@pytest.mark.parametrize("tokens", [4, 5, 11, 18, 31])
def test_a_budget_is_met_exactly(decider, tokens):
    model = vit(**DECIDERS[decider], superpatch_tokens=tokens)
    for clip in (half_even(3), torch.zeros(1, 3, 4, 32, 32), torch.randn(2, 3, 4, 32, 32)):
        made = model.embed(clip)
        assert made.x.shape == (len(clip), tokens, 24)
        assert made.asked is None
        assert (made.sizes() > 0).all()
        assert made.sizes().sum(1).tolist() == [PATCHES] * len(clip)
        assert made.places().max() == tokens - 1


@every_decider
@pytest.mark.parametrize("budget", [{}, {"superpatch_tokens": 13}])
def test_pixels_that_are_not_finite_stay_the_losss_business(decider, budget):
    model, clips = vit(**DECIDERS[decider], **budget), half_even(2)
    clean = model(clips)
    for value in (torch.nan, torch.inf):
        broken = clips.clone()
        broken[0, 1, 2, 3, 30] = value
        logits = model(broken)
        assert not logits[0].isfinite().any()
        torch.testing.assert_close(logits[1], clean[1])


def test_a_budget_is_met_however_large_the_pixels():
    model = vit(superpatches="contrast", superpatch_tokens=4)
    tokens = model.embed(1e6 * torch.randn(2, 3, 4, 32, 32))
    assert tokens.count().tolist() == [4, 4]


def test_a_budget_takes_the_groups_of_the_highest_scores():
    chosen = Superpatches(
        (1, 64, 64),
        (1, 8, 8),
        24,
        superpatches="contrast",
        superpatch_tokens=34,
        superpatch_shapes=[(1, 2, 2)],
    )
    scores = torch.rand(3, 16)
    owner = chosen.choose([scores])
    for clip, score in zip(owner, scores, strict=True):
        assert (clip.unique()[clip.unique() >= 64] - 64).tolist() == score.topk(
            10
        ).indices.sort().values.tolist()
    chosen.tokens = 33  # one group more saves too much by two: it stands for two of its patches
    counts = [
        sorted((clip.bincount()[64:][clip.bincount()[64:] > 0]).tolist())
        for clip in chosen.choose([scores])
    ]
    assert counts == [[2] + [4] * 10] * 3


def test_unmerging_undoes_merging():
    """Of an even clip with even positions, every patch has the features that it has alone."""
    for decider in ("contrast",):
        plain = vit()
        plain.pos_embed.data[:] = torch.randn(24)
        model = vit(**DECIDERS[decider])
        model.load_state_dict(plain.state_dict(), strict=False)
        for vector in model.superpatches.vectors:
            nn.init.zeros_(vector)
        clip = torch.randn(2, 3, 1, 1, 1).expand(2, 3, 4, 32, 32)
        assert model.embed(clip).x.shape[1] == 4
        torch.testing.assert_close(model.embed(clip).to_grid(), plain.embed(clip).to_grid())
    tokens = vit(**DECIDERS["contrast"]).embed(half_even())
    for x, token, grid in zip(tokens.x, tokens.places(), tokens.to_grid().flatten(1, 3), strict=True):
        assert grid.equal(x[token])


def test_a_still_clip_merged_over_time_is_itself():
    """With positions that are the same over time, as an image model's are."""
    plain = vit()
    plain.pos_embed.data[:] = plain.pos_embed[:, :1]
    model = vit(superpatches="contrast", superpatch_shapes=[(2, 1, 1)])
    model.load_state_dict(plain.state_dict(), strict=False)
    nn.init.zeros_(model.superpatches.vectors[0])
    clip = torch.randn(2, 3, 1, 32, 32).expand(2, 3, 4, 32, 32)
    assert model.embed(clip).x.shape[1] == 16
    torch.testing.assert_close(model.embed(clip).to_grid(), plain.embed(clip).to_grid())


def test_a_superpatch_has_its_shapes_vector_and_the_mean_of_positions():
    model = vit(superpatches="contrast", superpatch_shapes=[(2, 2, 2), (1, 2, 2)])
    clip = half_even(2)[:1]
    tokens = model.embed(clip)
    sizes, member = tokens.sizes()[0], group_members(GRID, (2, 2, 2))[0]
    token = tokens.places()[0, member[0]]
    assert sizes[token] == 8
    pixels = clip[0, :, :, :16, :16].reshape(3, 2, 2, 8, 2, 8, 2).mean((2, 4, 6)).flatten()
    expected = model.patch_embed.proj.weight.flatten(1) @ pixels + model.patch_embed.proj.bias
    expected = expected + model.pos_embed.flatten(0, 3)[member].mean(0) + model.superpatches.vectors[0]
    torch.testing.assert_close(tokens.x[0, token], expected)


STVIT = {"name": "stvit_tiny_patch16_224", "semantic_tokens": (2, 2, 2), "base_depth": 1}
MODELS = {
    "dense": {},
    "class token": {"class_token": True},
    "semantic": STVIT,
    "semantic at once": STVIT | {"base_depth": 0},
    **{name: STVIT | {"reducer": name} for name in ("pool", "random", "tome")},
    "schedule": STVIT | {"reducer": "tome", "semantic_tokens": None, "tome_r": 2},
}
every_model = pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)


@every_decider
@every_model
def test_one_clip_alone_is_itself_in_a_batch(decider, sizes):
    """Of clips with different numbers of tokens; and clips may be permuted."""
    model, clips = vit(**DECIDERS[decider], **sizes), half_even(3)
    tokens = model.embed(clips)
    numbers = (tokens.sizes() > 0).sum(1)
    if decider == "contrast":
        assert len(numbers.unique()) == 3
    logits, grids = model(clips), model.grids(clips)[0]
    for i in range(3):
        assert (model(clips[i : i + 1]) - logits[i]).abs().max() <= 1e-5
        assert (model.grids(clips[i : i + 1])[0] - grids[i]).abs().max() <= 1e-5
    order = torch.tensor([2, 0, 1])
    assert model(clips[order]).allclose(logits[order], atol=1e-6)


@pytest.mark.parametrize("class_token", [False, True])
def test_clips_of_many_tokens_make_no_work_for_those_of_few(class_token):
    """Layers see clips with about as many tokens together, and each keeps its place in the batch."""
    model, clips = vit(superpatches="contrast", class_token=class_token), torch.zeros(4, 3, 4, 32, 32)
    for clip, noisy in zip(clips, (0, 32, 8, 24), strict=True):
        clip[..., :noisy] = torch.randn_like(clip[..., :noisy])
    alone = torch.cat([model(clip[None]) for clip in clips])
    seen = []
    model.blocks[-1].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    torch.testing.assert_close(model(clips), alone, atol=1e-6, rtol=1e-5)
    assert model.clip_tokens.tolist() == [4, 32, 14, 28]
    assert seen == [(1, n + class_token) for n in (4, 14, 28, 32)]
    model.train()(clips)
    assert seen[4:] == [(4, 32 + class_token)]


@every_decider
@every_model
@pytest.mark.parametrize("budget", [{}, {"superpatch_tokens": 13}])
def test_gradients_reach_what_should_have_them(decider, sizes, budget):
    model, clips = vit(**DECIDERS[decider], **sizes, **budget).train(), half_even(3)
    statistics = [buffer.clone() for buffer in model.superpatches.buffers()]
    model(clips).square().sum().backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    policy = {n for n, p in model.named_parameters() if n.startswith("superpatches.policy.")}
    vectors = {n for n, _ in model.named_parameters() if n.startswith("superpatches.vectors.")}
    assert {n for n, _ in model.named_parameters()} - got <= policy | vectors
    assert not got & policy
    assert decider == "dcts" or got & vectors  # of the shapes that are there
    assert all(map(torch.equal, statistics, model.superpatches.buffers()))
    assert decider == "contrast" or not model.superpatches.policy.training


@every_decider
@every_model
@pytest.mark.parametrize("budget", [{}, {"superpatch_tokens": 13}])
def test_in_half_precision_it_trains_and_contrast_decides_alike(decider, sizes, budget):
    model, clips = vit(**DECIDERS[decider], **sizes, **budget).train(), half_even(3)
    torch.manual_seed(0)  # the random reducer draws
    expected = model(clips)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        out, halved = model(clips), model.embed(clips)
    torch.testing.assert_close(out.float(), expected, atol=0.15, rtol=0.1)
    if decider == "contrast":
        assert halved.token.equal(model.embed(clips).token)
    out.square().sum().backward()
    assert model.patch_embed.proj.weight.grad.isfinite().all()


@pytest.mark.parametrize(("decider", "sizes"), [("contrast", {"class_token": True} | STVIT), ("dcts", {})])
def test_a_budget_exports_and_counts(decider, sizes, monkeypatch):
    monkeypatch.setattr(superpatches, "HALVINGS", 2)  # less to trace
    shapes = [(2, 2, 2), (2, 1, 1)]
    model = vit(**DECIDERS[decider], **sizes, depth=3, superpatch_tokens=13, superpatch_shapes=shapes)
    clip = half_even(2)
    program = torch.export.export(model, (clip,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = half_even(3)
    torch.testing.assert_close(program.module()(more), model(more))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(clip[:1])
    assert counter.get_total_flops() // 2 == multiply_adds(model, num_frames=4, image_size=32)


@pytest.mark.parametrize("name", ["40", "20", "long64", "long128"])
def test_joined_recipes_cost_what_they_say(name):
    """In the README, on the page about them, and at their head."""
    recipe = f"k400_joined_{name}"
    config = resolve(parse(make_parser(""), ["--cfg", recipe])[0])
    with torch.device("meta"):
        model = build_model(config, 400)
    frames = config.data.num_frames
    cost = f"{multiply_adds(model, num_frames=frames, image_size=224) / 1e9:.1f} G"
    millions = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"
    (row,) = (line for line in (ROOT / "README.md").read_text().splitlines() if f"`{recipe}`" in line)
    assert f"| {frames}x224x224 | {millions} | **{cost}** |" in row
    head = (ROOT / "configs" / f"{recipe}.yaml").read_text()
    assert f"Cost: {cost} multiply-adds" in head
    assert f"{millions} parameters" in head
    rows = [
        line for line in (ROOT / "docs" / "joined.md").read_text().splitlines() if f"| `{recipe}`" in line
    ]
    assert all(line.endswith(f"| {cost} |") for line in rows)
    assert rows
    if frames > 16:
        assert float(cost[:-2]) < 180.3  # a dense clip of 16 frames


def test_a_dense_checkpoint_loads_and_a_policy_is_never_left_out_unsaid():
    plain, model = vit(), vit(**DECIDERS["contrast"])
    report = load_weights(model, plain.state_dict())
    assert set(report.fresh) == {n for n, _ in model.named_parameters() if "vectors" in n}
    with pytest.raises(WeightsError, match=r"missing     superpatches\.policy"):
        load_weights(vit(**DECIDERS["dcts"]), plain.state_dict())
    copy = create_model(**model.built)
    load_weights(copy, model.state_dict(), fresh=())
    clip = half_even()
    assert copy.eval()(clip).equal(model(clip))


def test_what_a_group_has_learnt_goes_to_the_group_of_its_shape():
    """An image's groups into a video's, and a policy into a model with fewer shapes."""

    def saved(model):
        values = {"format": FORMAT, "model": model.state_dict(), "ema": None, "built": model.built}
        return values | {"class_names": ["a", "b", "c", "d", "e"]}

    image = vit(superpatches="contrast", num_frames=1, patch_size=(1, 8, 8))
    video = vit(superpatches="contrast")
    before = [vector.clone() for vector in video.superpatches.vectors]
    report = load_weights(video, saved(image))
    assert (image.superpatches.shapes, video.superpatches.shapes) == (
        [(1, 4, 4), (1, 2, 2)],
        [(2, 2, 2), (1, 2, 2), (2, 1, 1)],
    )
    expected = [before[0], image.superpatches.vectors[1], before[2]]
    assert all(map(torch.equal, video.superpatches.vectors, expected))
    assert "of groups of (1, 4, 4), which the model has not" in report.dropped["superpatches.vectors.0"]

    every, few = (
        vit(**DECIDERS["dcts"], superpatch_shapes=shapes) for shapes in (None, [(2, 1, 1), (1, 2, 2)])
    )
    load_weights(few, saved(every))
    assert few.superpatches.shapes == [(1, 2, 2), (2, 1, 1)]
    clip = half_even()
    of_every, of_few = (model.superpatches.scores(clip) for model in (every, few))
    assert all(map(torch.equal, of_few, of_every[1:]))


def test_where_nothing_is_merged_it_is_the_plain_model_and_every_parameter_is_used():
    """DistributedDataParallel waits for the gradient of each, whatever this process's clips are."""
    model = vit(superpatches="contrast", superpatch_threshold=0.0)
    plain = vit()
    plain.load_state_dict({k: model.state_dict()[k] for k in plain.state_dict()})
    clips = torch.randn(2, 3, 4, 32, 32)
    assert model(clips).equal(plain(clips))
    model(clips).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(vector.grad.any() for vector in model.superpatches.vectors)


def test_layer_decay_knows_them():
    from timm.models import group_parameters

    model = vit(**DECIDERS["dcts"])
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    assert groups["superpatches.vectors.0"] == groups["pos_embed"]


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        ({"superpatch_tokens": 3}, "superpatch_tokens=3 must lie between 4 and 32"),
        ({"superpatch_tokens": 33}, "superpatch_tokens=33 must lie between 4 and 32"),
        ({"superpatch_tokens": 9, "superpatch_threshold": 0.1}, "only one of them"),
        ({"superpatch_shapes": [(1, 8, 8)]}, r"\(1, 8, 8\).*at most \(2, 4, 4\)"),
        ({"superpatch_shapes": [(1, 1, 1)]}, r"\(1, 1, 1\)"),
        ({"superpatch_shapes": []}, "there is none"),
        ({"superpatch_threshold": 2}, "superpatch_threshold=2: must lie between 0 and 1"),
        ({"superpatches": "dcts", "superpatch_policy": "resnot"}, "timm has no such model"),
        ({"superpatches": "depth"}, "superpatches=depth: must be one of"),
    ],
)
def test_sizes_that_do_not_fit(sizes, rule):
    with pytest.raises(ValueError, match=rule):
        vit(**{"superpatches": "contrast"} | sizes)
    assert isinstance(vit(**DECIDERS["contrast"]).embed(half_even()), Tokens)
