"""The contract of reducers, for each of them and for several in one model; and tokens by value."""

import dataclasses
import subprocess
import sys
from functools import partial
from typing import Annotated, get_args

import pytest
import torch
from test_models import CLIP, TINY
from torch import nn

from stvit_video import create_model
from stvit_video.bounds import Range, check
from stvit_video.models import zoo
from stvit_video.models.reducers import REDUCERS, MergedTokens, PooledTokens
from stvit_video.models.semantic import SemanticTokens
from stvit_video.models.sizes import Sizes
from stvit_video.models.tokens import PADDING, Tokens, batch, regions
from stvit_video.models.vit import VideoViT
from stvit_video.models.zoo import HEADS, MODELS

SIZES = CLIP | TINY
GRID, PATCHES = (2, 4, 4), 32
BUDGET = {"semantic_tokens": (2, 2, 3)}
PLANS = {name: {1: partial(REDUCERS[name], **BUDGET)} for name in REDUCERS}
PLANS["semantic, merged"] = {1: partial(SemanticTokens, **BUDGET, pool="merge", semantic_proportional=True)}
PLANS["schedule"] = dict.fromkeys(range(5), partial(MergedTokens, tome_r=3))
PLANS["two"] = {
    1: partial(MergedTokens, semantic_tokens=(2, 3, 3)),
    2: partial(SemanticTokens, semantic_tokens=(1, 2, 3)),
}
PLANS["two, semantic first"] = {
    0: partial(SemanticTokens, semantic_tokens=(2, 3, 4), pool="avg"),
    3: partial(MergedTokens, semantic_tokens=(1, 2, 3)),
}
every_plan = pytest.mark.parametrize("plan", PLANS)


def model_of(plan, **sizes):
    torch.manual_seed(0)
    model = VideoViT(**SIZES | sizes, reducers=PLANS.get(plan))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def merged(count, dim=24):
    """One clip's tokens, `count` of them, of consecutive patches."""
    token = (torch.arange(PATCHES) * count // PATCHES)[None]
    size = token.flatten().bincount().float()[None]
    return Tokens(torch.randn(1, count, dim), GRID, token, weight=size, asked=size)


def assert_is_alone(padded, i, alone):
    """Clip i of a batch is the clip alone, and then padding."""
    n = alone.x.shape[1]
    torch.testing.assert_close(padded.x[i, :n], alone.x[0])
    torch.testing.assert_close(padded.sizes()[i, :n], alone.sizes()[0])
    assert not padded.sizes()[i, n:].any()
    assert padded.places()[i].equal(alone.places()[0])
    torch.testing.assert_close(padded.to_grid()[i], alone.to_grid()[0])
    torch.testing.assert_close(padded.pooled()[i], alone.pooled()[0])


# ---- every reducer


@every_plan
@pytest.mark.parametrize("training", [False, True])
def test_sizes_sum_to_the_patches_and_tokens_stand_for_so_many(plan, training):
    model = model_of(plan).train(training)
    clip = torch.randn(3, 3, 4, 32, 32)
    for _, tokens in model._layers(clip):
        sizes = tokens.sizes()
        assert sizes.dtype == torch.float32
        assert sizes.sum(1).tolist() == [PATCHES] * 3
        counts = [token.bincount(minlength=tokens.x.shape[1]).tolist() for token in tokens.places()]
        assert sizes.tolist() == counts
        for key in ("weight", "asked"):  # token merging counts patches, other reducers make equal tokens
            assert getattr(tokens, key) is None or getattr(tokens, key).equal(sizes)
        for grid, x, token in zip(tokens.to_grid().flatten(1, 3), tokens.x, tokens.places(), strict=True):
            assert grid.equal(x[token])
    assert tokens.x.shape[1] < PATCHES


@every_plan
def test_a_padded_batch_is_each_clip_alone(plan):
    model = model_of(plan).eval()
    clips = [merged(count) for count in (32, 29, 13, 12, 7, 1)]
    padded = batch(clips)
    assert (padded.asked == 0).any()
    for reducer, used, rest in model.segments:
        if reducer is not None:
            padded = reducer(padded, used, None)
            clips = [reducer(clip, used, None) for clip in clips]
        for block in rest:
            padded = padded._replace(x=block(padded.x, bias=padded.bias()))
            clips = [clip._replace(x=block(clip.x, bias=clip.bias())) for clip in clips]
        for i, clip in enumerate(clips):
            assert_is_alone(padded, i, clip)


@pytest.mark.parametrize("name", REDUCERS)
def test_what_stands_in_padding_changes_nothing(name):
    reducer = REDUCERS[name](GRID, 24, **BUDGET).eval()
    used = list(model_of(name).eval().blocks)[: reducer.layers]
    padded = batch([merged(30), merged(17)])
    other = padded._replace(x=padded.x.masked_fill(padded.asked[..., None] == 0, 7.0))
    one, two = (reducer(tokens, used, None) for tokens in (padded, other))
    real = one.sizes() > 0
    assert one.x[real].equal(two.x[real])
    assert one.places().equal(two.places())


@every_plan
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(plan, checkpointing):
    model = model_of(plan, checkpointing=checkpointing)
    model(torch.randn(2, 3, 4, 32, 32)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_plan
def test_checkpointing_changes_nothing(plan):
    gradients, clip = [], torch.randn(2, 3, 4, 32, 32)
    for checkpointing in (False, True):
        model = model_of(plan, drop_path=0.3, checkpointing=checkpointing)
        torch.manual_seed(1)
        model(clip).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


@every_plan
@pytest.mark.parametrize("training", [False, True])
def test_the_graph_has_no_break_and_is_traced_once(plan, training):
    model, graphs = model_of(plan).train(training), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)  # a break is an error
    for clip in torch.randn(2, 2, 3, 4, 32, 32):
        torch.manual_seed(1)
        expected = model(clip)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(clip), expected)
    assert len(graphs) == 1


@every_plan
def test_layer_decay_knows_every_parameter(plan):
    from timm.models import group_parameters

    model = model_of(plan)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups.keys() == {name for name, _ in model.named_parameters()}
    for name in (name for name in groups if name.endswith("centres")):
        first = next(f for n, f, *_ in model._plan if n == name.partition(".")[0])
        assert groups[name] == groups[f"blocks.{first + 1}.attn.qkv.weight"]
        assert name in model.no_weight_decay()


def test_regions_are_the_parts_that_pooling_takes():
    grid, tokens = (4, 6, 6), (2, 3, 2)
    token = regions(grid, tokens)
    assert token[0].bincount().tolist() == [2 * 2 * 3] * 12
    x = torch.randn(1, *grid, 3)
    pooled = PooledTokens(grid, 3, semantic_tokens=tokens, pool="avg")(Tokens.of(x), []).x
    for i in range(12):
        torch.testing.assert_close(x.flatten(1, 3)[0, token[0] == i].mean(0), pooled[0, i])
    assert regions((1, 1, 5), (1, 1, 3)).tolist() == [[0, 0, 1, 1, 2]]  # floor(3 p / 5)


def test_a_patch_that_is_not_kept_has_the_nearest_that_is():
    reducer = REDUCERS["random"](GRID, 1, semantic_tokens=(1, 2, 2))
    places = torch.cartesian_prod(*(torch.arange(n) for n in GRID))
    patches = Tokens.of(torch.arange(PATCHES).float().view(1, *GRID, 1).repeat(2, 1, 1, 1, 1))
    for training in (True, False):
        tokens = reducer.train(training)(patches, [])
        for kept, token in zip(tokens.x[..., 0].long(), tokens.places(), strict=True):
            apart = (places[:, None] - places[kept]).square().sum(-1)
            assert apart.gather(1, token[:, None])[:, 0].equal(apart.min(1).values)


def test_the_schedule_merges_in_every_layer():
    sizes = TINY | {"depth": 4}
    model = create_model("tome_vit_tiny_patch16_224", **CLIP, **sizes, tome_r=12).eval()
    seen = [tokens.x.shape[1] for _, tokens in model._layers(torch.randn(2, 3, 4, 32, 32))]
    assert seen == [32, 20, 10, 5, 3]  # at most half
    same = create_model("stvit_tiny_patch16_224", **CLIP, **sizes, tome_r=12, reducer="tome").eval()
    same.load_state_dict(model.state_dict())
    clip = torch.randn(2, 3, 4, 32, 32)
    assert same(clip).equal(model(clip))
    first = model.segments[1][0](Tokens.of(torch.randn(2, *GRID, 24)), [model.blocks[0]])
    assert first.bias().equal(first.sizes().log()[:, None, None])


# ---- tokens by value


def test_a_grid_comes_back_as_it_was():
    grid = torch.randn(2, *GRID, 5)
    tokens = Tokens.of(grid)
    assert tokens.to_grid().data_ptr() == grid.data_ptr()
    assert tokens.to_grid().equal(grid)
    assert tokens.bias() is None
    assert tokens.pooled().equal(grid.flatten(1, 3).mean(1))
    assert tokens._replace(token=tokens.places()).to_grid().equal(grid)


def test_the_mean_of_merged_tokens_is_that_of_their_patches():
    tokens = merged(7)
    torch.testing.assert_close(tokens.pooled(), tokens.to_grid().mean((1, 2, 3)))
    assert tokens._replace(weight=None).pooled().equal(tokens.x.mean(1))


def test_tokens_that_leave():
    x = torch.arange(8.0).view(2, 4, 1)
    token = torch.tensor([[0, 0, 1, 2, 3, 3], [0, 1, 1, 2, 2, 3]])
    size = torch.tensor([[2.0, 1, 1, 2], [1, 2, 2, 1]])
    tokens = Tokens(x, (1, 2, 3), token, weight=size, asked=size)
    gone = torch.tensor([[True, False, False, False], [False, True, True, False]])
    fewer = tokens.leave(gone)
    assert fewer.x.shape == (2, 3, 1)
    assert fewer.x[0, :, 0].tolist() == [1, 2, 3]
    assert fewer.x[1, :2, 0].tolist() == [4, 7]
    assert fewer.weight.tolist() == fewer.asked.tolist() == [[1, 1, 2], [1, 1, 0]]
    assert fewer.token.tolist() == [[-1, -1, 0, 1, 2, 2], [0, -1, -1, -1, -1, 1]]
    assert fewer.left[..., 0].tolist() == [[0, 0, 0, 0, 0, 0], [0, 5, 5, 6, 6, 0]]
    assert fewer.to_grid().equal(tokens.to_grid())
    torch.testing.assert_close(fewer.pooled(), tokens.pooled())
    later = fewer._replace(x=fewer.x + 10).leave(torch.tensor([[False, True, False], [True, True, False]]))
    assert later.to_grid().flatten(1).tolist() == [[0, 0, 11, 12, 13, 13], [14, 5, 5, 6, 6, 17]]
    assert later.weight.tolist() == [[1, 2], [0, 0]]
    assert later.left[..., 0].tolist() == [[0, 0, 0, 12, 0, 0], [14, 5, 5, 6, 6, 17]]


def test_who_has_left_is_not_asked_and_comes_back_with_a_grid():
    block, tokens = model_of("tome").eval().blocks[0], Tokens.of(torch.randn(2, *GRID, 24))
    gone = torch.rand(2, PATCHES) < torch.tensor([[0.3], [0.7]])
    fewer = tokens.leave(gone)
    after = fewer._replace(x=block(fewer.x, bias=fewer.bias()))
    for i in range(2):
        alone = block(tokens.x[i : i + 1, ~gone[i]])
        grid = after.to_grid().flatten(1, 3)[i]
        torch.testing.assert_close(grid[~gone[i]], alone[0])
        assert grid[gone[i]].equal(tokens.x[i, gone[i]])
    pooled = PooledTokens(GRID, 24, semantic_tokens=(1, 2, 2), pool="avg")(after, [])
    expected = after.to_grid().view(2, 2, 2, 2, 2, 2, 24).mean((1, 3, 5)).flatten(1, 2)
    torch.testing.assert_close(pooled.x, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("proportional", [False, True])
def test_padding_is_not_asked_and_gives_no_nan(dtype, proportional):
    half = batch([merged(9), merged(4)])
    half = half if proportional else half._replace(asked=(half.asked > 0).float())
    tokens = half._replace(x=half.x.to(dtype), asked=half.asked * torch.tensor([[1.0], [0.0]]))
    q = torch.randn(2, 2, 9, 12).to(dtype) * 20
    value = torch.randn(2, 2, 9, 12).to(dtype).requires_grad_()
    out = nn.functional.scaled_dot_product_attention(q, q, value, attn_mask=tokens.bias())
    assert out.isfinite().all()
    out = nn.functional.scaled_dot_product_attention(q, q, value, attn_mask=half.bias(dtype))
    (gradient,) = torch.autograd.grad(out.float().sum(), value)
    assert not gradient[1, :, 4:].any()
    assert gradient[1, :, :4].any()
    assert tokens._replace(weight=half.weight * 0).pooled().isfinite().all()


def test_a_bias_is_there_only_where_it_is_needed():
    tokens = merged(9)
    assert tokens.bias().equal(tokens.sizes().log()[:, None, None])
    for name in ("semantic", "pool", "random"):
        assert model_of(name).tokens(torch.randn(1, 3, 4, 32, 32)).bias() is None
    plain = MergedTokens(GRID, 24, **BUDGET, proportional=False)
    layers, patches = [model_of("tome").blocks[0]], Tokens.of(torch.randn(2, *GRID, 24))
    assert plain(patches, layers).bias() is None
    few = batch([patches, merged(5)])
    assert plain(few, layers).bias().unique().tolist() == [PADDING, 0]


# ---- models


@every_plan
def test_grids_of_layers(plan):
    model, clip = model_of(plan).eval(), torch.randn(2, 3, 4, 32, 32)
    states = {}
    for layer, tokens in model._layers(clip):
        states[layer] = tokens
    layers = [layer for layer in (5, 2, 4) if layer in states]
    for grid, layer in zip(model.grids(clip, layers), layers, strict=True):
        assert grid.shape == (2, *GRID, 24)
        assert grid.equal(states[layer].to_grid())
    assert model.grids(clip)[0].equal(model.tokens(clip).to_grid())
    for wrong in [0, 6, *(layer for layer in range(1, 6) if layer not in states)]:
        with pytest.raises(ValueError, match=rf"layers=\[{wrong}\]: there are tokens after"):
            model.grids(clip, [wrong])


def test_maps_after_merging_are_of_patches():
    model = model_of("two").eval()
    maps = model.semantic_maps(torch.randn(2, 3, 4, 32, 32))
    assert maps.shape == (2, 6, *GRID)
    torch.testing.assert_close(maps.sum((2, 3, 4)), torch.ones(2, 6))


def test_reducers_that_do_not_fit():
    for places in ({1: PLANS["semantic"][1], 2: PLANS["tome"][1]}, {4: PLANS["semantic"][1]}):
        with pytest.raises(ValueError, match="must fit into depth=5"):
            VideoViT(**SIZES, reducers=places)


SWIN = {"embed_dim": 12, "depths": [1, 1, 6, 1], "num_heads": [1, 2, 2, 4], "window_size": (2, 2, 2)}
SMALL = {
    **{f"{kind}_tiny_patch16_224": TINY for kind in ("vit", "stvit", "pool_vit", "random_vit", "tome_vit")},
    "video_swin_tiny": SWIN,
    "stvit_video_swin_tiny": SWIN | {"semantic_tokens": [2, 1, 1]},
    "stvit_r_video_swin_small": SWIN | {"semantic_tokens": (2, 1, 1)},
}


def small(name, **sizes):
    reduced = "vit" in name and "patch16" in name and not name.startswith("vit")
    tokens = {"semantic_tokens": (2, 2, 2), "base_depth": 1} if reduced else {}
    return create_model(name, **CLIP | SMALL[name] | tokens | sizes).eval()


@pytest.mark.parametrize("name", SMALL)
def test_a_backbone_gives_pooled_features(name):
    model, backbone, clip = small(name), small(name, num_classes=0), torch.randn(2, 3, 4, 32, 32)
    state = model.state_dict()
    assert state.keys() - backbone.state_dict().keys() == {"head.weight", "head.bias"}
    backbone.load_state_dict({k: t for k, t in state.items() if not k.startswith("head.")})
    assert backbone(clip).equal(model.pooled_features(clip))


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("ptv_")])
def test_a_baseline_has_no_features_without_its_head(name):
    with pytest.raises(ValueError, match=rf"num_classes=0 of {name}"):
        create_model(name, num_classes=0)


@pytest.mark.parametrize("name", SMALL)
def test_a_model_knows_what_it_was_built_with(name):
    model, clip = small(name, drop_path=0.1), torch.randn(1, 3, 4, 32, 32)
    assert model.built.keys() == {"name", *CLIP} | MODELS[name].sizes.keys()
    assert model.built["drop_path"] == 0.1
    assert "auto" not in model.built.values()
    assert not [v for v in model.built.values() if not isinstance(v, int | float | str | list | None)]
    same = create_model(**model.built).eval()
    assert same.built == model.built
    same.load_state_dict(model.state_dict())
    assert repr(same) == repr(model)
    assert same(clip).equal(model(clip))


def test_defaults_of_one_frame_are_what_is_built():
    built = create_model("stvit_tiny_patch16_224", num_classes=3, num_frames=1).built
    assert (built["patch_size"], built["semantic_tokens"]) == ([1, 16, 16], [1, 4, 4])
    assert (built["base_depth"], built["semantic_layers"], built["tome_r"]) == (4, 2, None)


def test_sizes_are_those_that_the_models_take():
    taken = {size for entry in MODELS.values() for size in entry.sizes}
    taken |= {size for head in HEADS.values() for size in zoo._sizes(head)}
    assert {field.name for field in dataclasses.fields(Sizes)} == taken
    assert {field.default for field in dataclasses.fields(Sizes)} == {"auto"}
    assert set(get_args(get_args(Sizes.__annotations__["reducer"])[0])) == REDUCERS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_the_defaults_of_every_name_are_within_bounds(name):
    sizes = MODELS[name].sizes
    assert len(sizes) == 0 or None not in (sizes["embed_dim"], sizes["num_heads"])
    check(Sizes, sizes)


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ({"embed_dim": 0}, "embed_dim=0: must lie between 1 and inf"),
        ({"embed_dim": 1.5}, "embed_dim=1.5: must be whole numbers"),
        ({"embed_dim": True}, "embed_dim=True: must be whole numbers"),
        ({"num_heads": [3, 0]}, r"num_heads=\[3, 0\]: must lie between 1 and inf"),
        ({"patch_size": (2, 8, 8.0)}, r"patch_size=\(2, 8, 8.0\): must be whole numbers"),
        ({"semantic_tokens": (0, 1, 1)}, r"semantic_tokens=\(0, 1, 1\): must lie between 1 and inf"),
        ({"drop_path": float("nan")}, "drop_path=nan: must lie between 0 and 0.999"),
        ({"mlp_ratio": 0}, "mlp_ratio=0: must lie between 0.01 and inf"),
        ({"pool": "median"}, r"pool=median: must be one of \['max', 'avg', 'grid', 'merge'\]"),
    ],
)
def test_bounds(value, rule):
    with pytest.raises(ValueError, match=f"^model.{rule}$"):
        check(Sizes, value, "model.")


def test_what_lies_within_bounds():
    check(Sizes, {"embed_dim": "auto", "semantic_tokens": None, "num_heads": [3, 6], "drop_path": 0})
    check(Sizes, {"patch_size": [1, 8, 8], "layer_scale": -1e-5, "centres": True, "unknown": -1})
    check({"share": Annotated[float, Range(0, 1)]}, {"share": 1})


def test_models_need_no_video_library():
    """In an interpreter where those of data and command line cannot be imported."""
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "for name in ('av', 'jsonargparse', 'matplotlib', 'decord', 'yaml'): sys.modules[name] = None\n"
        "import types; package = types.ModuleType('stvit_video')\n"
        "package.__path__ = [sys.argv[1]]; sys.modules['stvit_video'] = package\n"
        "import stvit_video.weights, stvit_video.bounds, stvit_video.models.zoo\n"
    )
    import stvit_video

    done = subprocess.run(
        [sys.executable, "-c", code, stvit_video.__path__[0]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
