"""The controls: pooling, random patches, token merging; and that all models compile into one graph."""

import itertools
import math

import pytest
import torch
from test_models import CLIP, TINY
from torch.nn import functional as F

from stvit_video import create_model, list_models, multiply_adds
from stvit_video.models.layers import Block
from stvit_video.models.merging import merge_similar
from stvit_video.models.reducers import PooledTokens, RandomTokens
from stvit_video.models.tokens import Tokens, regions

CONTROLS = ("pool", "random", "tome")


def control(name, **sizes):
    sizes = {"base_depth": 1, "semantic_tokens": (2, 2, 2)} | TINY | sizes
    return create_model(f"{name}_vit_tiny_patch16_224", **CLIP, **sizes)


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_are_listed_and_are_a_setting_of_stvit(name):
    for size in ("tiny", "small", "base", "large"):
        assert f"{name}_vit_{size}_patch16_224" in list_models()
    model = control(name).eval()
    same = create_model(
        "stvit_tiny_patch16_224", **CLIP, **TINY, base_depth=1, semantic_tokens=(2, 2, 2), reducer=name
    ).eval()
    assert model.state_dict().keys() == same.state_dict().keys()
    same.load_state_dict(model.state_dict())
    clip = torch.randn(2, 3, 4, 32, 32)
    assert torch.equal(model(clip), same(clip))


@pytest.mark.parametrize("name", [*CONTROLS, "semantic"])
@pytest.mark.parametrize("tokens", [(2, 2, 2), (1, 3, 1), (2, 4, 4)])
def test_all_layers_after_it_run_on_the_budget(name, tokens):
    sizes = {"base_depth": 1, "semantic_tokens": tokens} | TINY
    model = create_model("stvit_tiny_patch16_224", **CLIP, **sizes, reducer=name)
    seen = []
    for block in model.segments[-1][2]:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    for training in (True, False):
        model.train(training)(torch.randn(2, 3, 4, 32, 32))
    n = tokens[0] * tokens[1] * tokens[2]
    assert set(seen) == {(2, n, 24)}
    features = model.forward_features(torch.randn(2, 3, 4, 32, 32))
    on_a_grid = name in ("semantic", "pool")
    assert features.shape == ((2, *tokens, 24) if on_a_grid else (2, 2, 4, 4, 24))
    assert model.tokens(torch.randn(2, 3, 4, 32, 32)).x.shape == (2, n, 24)


def merging(tokens, **sizes):
    sizes |= {"base_depth": 1, "semantic_tokens": tokens, "pool": "merge", "semantic_proportional": True}
    model = create_model("stvit_tiny_patch16_224", **CLIP, **TINY, **sizes).eval()
    return model, create_model("vit_tiny_patch16_224", **CLIP, **TINY).eval()


def test_merged_semantic_tokens_of_as_many_as_patches_are_the_dense_model():
    """Nothing is merged: the one semantic layer asks every patch, with every patch."""
    model, dense = merging((2, 4, 4), semantic_layers=1)
    model.load_state_dict(dense.state_dict())
    clip = torch.randn(2, 3, 4, 32, 32)
    torch.testing.assert_close(model(clip), dense(clip))
    assert model.tokens(clip).x.shape == (2, 32, 24)


@pytest.mark.parametrize("semantic_layers", [1, 2])
def test_semantic_tokens_start_as_means_of_what_is_alike(semantic_layers):
    """Patches of three kinds, mixed: each token stands for patches of one kind, and starts as one."""
    model, _ = merging((2, 2, 4), semantic_layers=semantic_layers)
    model.pos_embed.data.zero_()
    kind = torch.arange(32) // 2 % 3
    patches = (
        torch.randn(3, 3, 1, 8, 8)[kind].reshape(2, 4, 4, 3, 1, 8, 8).expand(-1, -1, -1, -1, 2, -1, -1)
    )
    clip = patches.permute(3, 0, 4, 1, 5, 2, 6).reshape(1, 3, 4, 32, 32)
    embedded = next(tokens for layer, tokens in model._layers(clip) if layer == 1)
    start = model.semantic._start(embedded)
    torch.testing.assert_close(start.to_grid(), embedded.to_grid())
    tokens = model.tokens(clip)
    assert len(set(zip(kind.tolist(), tokens.places()[0].tolist(), strict=True))) == 16
    assert (tokens.sizes() >= 1).all()
    assert tokens.asked.equal(tokens.sizes())
    maps = model.semantic_maps(clip)
    assert maps.shape == (1, 16, 2, 4, 4)
    torch.testing.assert_close(maps.sum((2, 3, 4)), torch.ones(1, 16))


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_gradient(name, checkpointing):
    model = control(name, checkpointing=checkpointing)
    model(torch.randn(2, 3, 4, 32, 32)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", CONTROLS)
def test_a_dense_checkpoint_fits_as_it_is(name):
    dense = create_model("vit_tiny_patch16_224", **CLIP, **TINY).state_dict()
    control(name).load_state_dict(dense)


def test_pooling_is_the_mean_or_the_largest():
    grid = torch.randn(2, 4, 6, 6, 5)
    cells = grid.view(2, 2, 2, 3, 2, 3, 2, 5)
    for pool, expected in (("avg", cells.mean((2, 4, 6))), ("max", cells.amax((2, 4, 6)))):
        tokens = PooledTokens((4, 6, 6), 5, semantic_tokens=(2, 3, 3), pool=pool)(Tokens.of(grid), [])
        assert tokens.sizes().tolist() == [[8.0] * 18] * 2
        torch.testing.assert_close(tokens.x, expected.flatten(1, 3))


def test_random_patches_are_others_in_each_clip_and_one_draw_in_scoring():
    grid = torch.arange(4 * 6 * 6.0).view(1, 4, 6, 6, 1).repeat(3, 1, 1, 1, 2)
    reducer, patches = RandomTokens((4, 6, 6), 2, semantic_tokens=(2, 3, 2)), Tokens.of(grid)
    torch.manual_seed(0)
    drawn = [reducer(patches, []).x[..., 0] for _ in range(100)]
    for tokens in drawn[0]:
        assert tokens.tolist() == sorted(set(tokens.tolist()))
        assert len(tokens) == 12
    assert len({tuple(tokens.tolist()) for round in drawn for tokens in round}) == 300
    shares = torch.bincount(torch.cat(drawn).flatten().long(), minlength=144) / 300
    assert ((shares - 12 / 144).abs() < 0.09).all()  # 5.6 standard deviations
    scored = reducer.eval()(patches, []).x[..., 0]
    assert len(scored[0].unique()) == 12
    again = RandomTokens((4, 6, 6), 2, semantic_tokens=(2, 3, 2)).eval()(
        patches._replace(x=patches.x[:1]), []
    )
    assert scored.equal(again.x[..., 0].expand(3, -1))
    spread = torch.arange(144.0).view(4, 6, 6)[1::2, 1::2, 1::3].flatten()
    assert not scored[0].equal(spread)  # not a grid: what it was trained on


def merged_by_hand(x, keys, n):
    """The same in loops, as the paper tells it: lists of (vector, key, size)."""
    items = [(x[i], keys[i], 1.0) for i in range(len(x))]
    while len(items) > n:
        gone = min(len(items) - n, len(items) // 2)
        a, b = items[::2], items[1::2]
        best = []
        for i, (_, key, _) in enumerate(a):
            likeness = [F.cosine_similarity(key, other, dim=0).item() for _, other, _ in b]
            best.append((max(likeness), i, likeness.index(max(likeness))))
        best.sort(reverse=True)
        joined = {i: partner for _, i, partner in best[:gone]}
        groups = [[other] for other in b]
        for i, partner in joined.items():
            groups[partner].append(a[i])
        items = [item for i, item in enumerate(a) if i not in joined]
        for group in groups:
            size = sum(s for *_, s in group)
            mean = [sum(part[k] * part[2] for part in group) / size for k in (0, 1)]
            items.append((*mean, size))
    return torch.stack([item[0] for item in items]), torch.tensor([item[2] for item in items])


@pytest.mark.parametrize(("count", "n"), [(16, 16), (16, 11), (16, 8), (17, 8), (17, 3), (32, 4), (5, 1)])
def test_merging_is_that_of_the_paper(count, n):
    torch.manual_seed(count + n)
    x, keys = torch.randn(3, count, 6), torch.randn(3, count, 4)
    tokens, sizes, joined = merge_similar(x, keys, n)
    assert tokens.shape == (3, n, 6)
    for i in range(3):
        expected = merged_by_hand(x[i], keys[i], n)
        torch.testing.assert_close((tokens[i], sizes[i]), expected)
    torch.testing.assert_close((tokens * sizes[..., None]).sum(1), x.sum(1))  # nothing is lost
    for i, j in itertools.product(range(3), range(n)):  # each is the mean of those that joined it
        torch.testing.assert_close(tokens[i, j], x[i][joined[i] == j].mean(0))
        assert sizes[i, j] == (joined[i] == j).sum()


def test_autocast_does_not_choose_whom_tokens_join():
    x, keys = torch.randn(2, 200, 4), torch.randn(2, 200, 6)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = merge_similar(x, keys, 60)
    for ours, theirs in zip(rounded, merge_similar(x, keys, 60), strict=True):
        assert ours.equal(theirs)


def test_what_is_merged_alike_is_asked_as_often_as_before():
    """Merging tokens that are the same changes nothing, if each is asked as often as it has members."""
    torch.manual_seed(0)
    block, x = Block(24, 3).eval(), torch.randn(2, 4, 24)
    twice = x[:, [0, 0, 1, 1, 2, 3]]
    tokens, sizes, _ = merge_similar(twice, twice, 4)
    assert sizes.tolist() == [[1, 2, 2, 1]] * 2
    torch.testing.assert_close(tokens, x[:, [2, 0, 1, 3]])
    answer = block(tokens, bias=sizes.log()[:, None, None])
    torch.testing.assert_close(answer, block(twice)[:, [4, 0, 2, 5]])


def test_bfloat16_counts_beyond_256():
    keys = torch.randn(1, 1, 4).repeat(1, 600, 1)
    tokens, sizes, _ = merge_similar(torch.ones(1, 600, 3, dtype=torch.bfloat16), keys.bfloat16(), 1)
    assert tokens.dtype == torch.bfloat16
    assert sizes.tolist() == [[600]]
    assert tokens.eq(1).all()
    model = control("tome").bfloat16().eval()
    assert model(torch.randn(1, 3, 4, 32, 32).bfloat16()).isfinite().all()


def test_proportional_attention_can_be_left_out():
    clip = torch.randn(1, 3, 4, 32, 32)
    weighted = control("tome").eval()
    plain = control("tome", proportional=False).eval()
    plain.load_state_dict(weighted.state_dict())
    assert not torch.allclose(weighted(clip), plain(clip))
    every = {"semantic_tokens": (2, 4, 4)}  # nothing to merge: all sizes are 1
    weighted, plain = control("tome", **every).eval(), control("tome", **every, proportional=False).eval()
    plain.load_state_dict(weighted.state_dict())
    torch.testing.assert_close(weighted(clip), plain(clip))


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"reducer=best: must be one of \['semantic', 'pool', .*'tome'\]"):
        create_model("stvit_tiny_patch16_224", **CLIP, **TINY, semantic_tokens=(2, 2, 2), reducer="best")
    with pytest.raises(TypeError, match="tome_vit_tiny_patch16_224 takes no size 'centres'"):
        control("tome", centres=True)
    with pytest.raises(ValueError, match="no semantic maps"):
        control("pool").semantic_maps(torch.randn(1, 3, 4, 32, 32))


SWIN = {"embed_dim": 12, "depths": [1, 1, 4, 1], "num_heads": [1, 2, 2, 4], "window_size": (2, 2, 2),
        "patch_size": (2, 4, 4)}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_tiny_patch16_224", TINY),
        *((f"{name}_tiny_patch16_224", TINY | {"base_depth": 1, "semantic_tokens": (2, 2, 2)})
          for name in ("stvit", "pool_vit", "random_vit", "tome_vit")),
        ("stvit_video_swin_tiny", SWIN | {"base_depth": 1, "semantic_tokens": (2, 1, 1)}),
    ],
)  # fmt: skip
def test_the_graph_has_no_break_and_is_traced_once(name, sizes, training):
    torch.manual_seed(0)
    model = create_model(name, **CLIP, **sizes).train(training)
    clips = torch.randn(2, 2, 3, 4, 32, 32)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)  # a break is an error
    for clip in clips:
        torch.manual_seed(1)
        expected = model(clip)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(clip), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize(("grid", "count"), [((4, 14, 14), (2, 4, 4)), ((3, 11, 7), (2, 10, 7))])
def test_grid_takes_a_patch_of_each_region(grid, count):
    places = torch.arange(math.prod(grid)).view(1, *grid, 1)
    taken = PooledTokens(grid, 1, semantic_tokens=count, pool="grid")(Tokens.of(places), []).x[0, :, 0]
    assert torch.equal(regions(grid, count)[0, taken], torch.arange(math.prod(count)))
    if grid[1] == 14:  # regions of rows 0-3, 4-6, 7-10 and 11-13
        assert (taken[:4] % 14).tolist() == [2, 5, 9, 12]


def test_semantic_tokens_asked_by_size():
    """As if each token stood in the sequence once for every patch of its region."""
    options = {"semantic_tokens": (1, 2, 3), "pool": "avg", "depth": 4, "base_depth": 1, "num_classes": 3}
    sizes = {"embed_dim": 12, "num_heads": 2, "patch_size": (2, 8, 8)} | options
    name, clip = "stvit_tiny_patch16_224", torch.randn(2, 3, 4, 40, 40)
    plain = create_model(name, num_frames=4, image_size=40, **sizes).eval()
    model = create_model(name, num_frames=4, image_size=40, semantic_proportional=True, **sizes).eval()
    model.load_state_dict(plain.state_dict())
    *_, (_, tokens), (_, last) = model._layers(clip)
    counts = torch.tensor([12, 12, 6, 8, 8, 4])  # 2 frames, of 3 and 2 rows, of 2, 2 and 1 columns
    assert tokens.asked.tolist() == [counts.tolist()]
    written_out = tokens.x.repeat_interleave(counts, 1)
    torch.testing.assert_close(last.x, model.blocks[-1](tokens.x, context=written_out))
    assert not torch.allclose(model(clip), plain(clip))


@pytest.mark.parametrize(
    "sizes",
    [
        {"name": "tome_vit_tiny_patch16_224", "semantic_tokens": (2, 2, 2), "base_depth": 1},
        {"name": "tome_vit_tiny_patch16_224", "tome_r": 3},
        {"name": "stvit_tiny_patch16_224", "semantic_tokens": (2, 2, 2), "base_depth": 1, "pool": "merge"},
    ],
)
def test_what_merges_is_counted_like_any_model(sizes):
    """The counter sees shapes alone, on the meta device: what depends on values costs its most there."""
    case = {"num_frames": CLIP["num_frames"], "image_size": CLIP["image_size"]}
    dense = create_model("vit_tiny_patch16_224", **CLIP, **TINY)
    assert 0 < multiply_adds(create_model(**sizes, **CLIP, **TINY), **case) < multiply_adds(dense, **case)
