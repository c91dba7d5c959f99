"""Swin, STViT on windows and STViT-R: parity with other implementations, and with brute force."""

import itertools
import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from timm.optim import param_groups_layer_decay
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from stvit_video import WeightsError, create_model, load_weights, multiply_adds
from stvit_video.models import windows
from stvit_video.models.embed import resize_grid
from stvit_video.models.layers import Attention, Block
from stvit_video.models.semantic import SemanticWindows
from stvit_video.models.swin import WindowAttention

FIXTURES = Path(__file__).parent / "fixtures"
CLOSE = {"atol": 1e-4, "rtol": 0}
TINY = {
    "num_classes": 5,
    "embed_dim": 8,
    "depths": [2, 2, 6, 2],
    "num_heads": [1, 2, 2, 4],
}


def tiny(name="stvit_video_swin_tiny", num_frames=4, image_size=64, **sizes):
    return create_model(name, num_frames=num_frames, image_size=image_size, **TINY | sizes)


def shake(model):
    """Random weights under which every tensor matters to the output."""
    for name, parameter in model.named_parameters():
        gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        scale = 0.5 if parameter.ndim == 1 or "bias_table" in name else 1.5 * parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, gain, scale)
    return model.eval()


def assert_same_logits(ours, theirs, *shapes):
    for shape in shapes:
        clip = torch.randn(shape)
        with torch.no_grad():
            logits, expected = ours(clip), theirs(clip)
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, **CLOSE)


# --- other implementations ---


def test_video_swin_tiny_is_torchvisions():
    theirs = shake(torchvision.models.video.swin3d_t())
    ours = create_model("video_swin_tiny", num_classes=400, num_frames=32).eval()
    assert load_weights(ours, theirs.state_dict(), fresh=()).origin == "torchvision Swin"
    assert_same_logits(ours, theirs, (1, 3, 10, 100, 132))


def test_any_size_is_torchvisions():
    sizes = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4]}
    theirs = torchvision.models.video.swin_transformer.SwinTransformer3d(
        patch_size=[2, 4, 4], window_size=[4, 3, 5], num_classes=7, **sizes
    )
    shake(theirs)
    ours = create_model("video_swin_tiny", num_classes=7, window_size=(4, 3, 5), **sizes).eval()
    load_weights(ours, theirs.state_dict(), fresh=())
    shapes = [(2, 3, 20, 96, 80), (1, 3, 9, 67, 101), (1, 3, 3, 64, 65), (2, 3, 1, 40, 250)]
    assert_same_logits(ours, theirs, *shapes)


def test_swin_tiny_is_timms():
    theirs = shake(timm.create_model("swin_tiny_patch4_window7_224", num_classes=10))
    ours = create_model("swin_tiny_patch4_window7_224", num_classes=10, num_frames=1).eval()
    assert load_weights(ours, theirs.state_dict(), fresh=()).origin == "timm Swin"
    assert_same_logits(ours, theirs, (2, 3, 224, 224))


def test_stvit_r_is_the_authors():
    reference = load_file(FIXTURES / "stvit_r_swin_reference.safetensors")
    state = {
        k.removeprefix("weights/"): v.float() for k, v in reference.items() if k.startswith("weights/")
    }
    model = create_model("stvit_r_swin_small", num_frames=1, **TINY | {"num_classes": 10})
    report = load_weights(model.eval(), state, fresh=())
    assert (report.origin, report.pixels.interpolation) == ("STViT-R", "bicubic")
    i = torch.arange(2 * 3 * 224 * 224, dtype=torch.float64)
    image = ((0.0137 * i).sin() + 0.5 * (0.00071 * i + 0.3).cos()).float().view(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(image), reference["out/logits"], **CLOSE)
        grids = model.grids(image, stages=(1, 2, 3, 4))
        again = model.forward_features(image, stages=(1, 2, 3, 4))
        assert all(map(torch.equal, grids, again))
        grids = [model.layers[i].downsample(grid) for i, grid in enumerate(grids[:3], 1)] + grids[3:]
        for i, grid in enumerate(grids):
            torch.testing.assert_close(grid.mean((1, 2, 3)), reference[f"out/layers.{i}_mean"], **CLOSE)


def test_the_authors_g_is_flat_over_the_grid_of_tokens():
    """Trained with USE_GLOBAL; row by row over all windows' tokens, for a video the same in every frame."""
    reference = load_file(FIXTURES / "stvit_r_swin_reference.safetensors")
    state = {
        k.removeprefix("weights/"): v.float() for k, v in reference.items() if k.startswith("weights/")
    }
    state["layers.2.semantic_token2"] = torch.randn(1, 36, 32)  # 2 x 2 windows of 3 x 3 tokens
    sizes = TINY | {"num_classes": 10, "centres": True, "image_size": 224}
    model = create_model("stvit_r_swin_small", num_frames=1, **sizes)
    load_weights(model, state, fresh=())
    centres = model.layers[2].semantic.centres
    assert torch.equal(centres[0, 0, 4, 5], state["layers.2.semantic_token2"][0, 4 * 6 + 5])
    clips = create_model("stvit_r_video_swin_small", num_frames=8, **sizes)
    load_weights(clips, state, fresh=())
    assert torch.equal(clips.layers[2].semantic.centres, centres.repeat(1, 4, 1, 1, 1))
    with pytest.raises(WeightsError, match="has a vector G per semantic token: model.centres=true"):
        load_weights(create_model("stvit_r_swin_small", num_frames=1, **sizes | {"centres": False}), state)


def test_every_tensor_of_the_authors_checkpoint_finds_its_place():
    shapes = json.loads((FIXTURES / "stvit_r_swin_s_keys.json").read_text())
    counters = {"dtype": torch.long}
    theirs = {
        name: torch.zeros(shape, **counters if name.endswith("num_batches_tracked") else {})
        for name, shape in shapes.items()
    }
    model = create_model("stvit_r_swin_small", num_classes=1000, num_frames=1)
    report = load_weights(model, {"model": theirs}, fresh=())
    assert report.loaded.keys() == model.state_dict().keys()
    assert {name.rpartition(".")[2] for name in report.dropped} == {"relative_position_index", "attn_mask"}
    assert set(report.dropped.values()) == {"recomputed from sizes"}


def test_microsofts_names_are_timms_with_the_merging_one_stage_down():
    timms = timm.create_model("swin_tiny_patch4_window7_224").state_dict()
    theirs = {}
    for key, value in timms.items():
        for i in (1, 2, 3):
            key = key.replace(f"layers.{i}.downsample", f"layers.{i - 1}.downsample")
        key = "cls_head.fc_cls." + key.removeprefix("head.fc.") if "head" in key else "backbone." + key
        theirs[key] = value
    models = [
        create_model("swin_tiny_patch4_window7_224", num_classes=1000, num_frames=1) for _ in range(2)
    ]
    assert load_weights(models[0], theirs, fresh=()).origin == "Microsoft Swin"
    assert load_weights(models[1], timms, fresh=()).origin == "timm Swin"
    ours, expected = (model.state_dict() for model in models)
    assert all(ours[name].equal(expected[name]) for name in ours)


def test_a_still_clip_through_an_inflated_model_is_the_image():
    sizes = TINY | {"depths": [2, 2, 2, 2], "image_size": 64}
    image_model = create_model("swin_tiny_patch4_window7_224", **sizes, num_frames=1, window_size=(1, 2, 2))
    shake(image_model)
    video = create_model("video_swin_tiny", **sizes, num_frames=16, window_size=(4, 2, 2)).eval()
    report = load_weights(video, image_model.state_dict(), fresh=())
    assert len(report.inflated) == 1 + 8  # the patch embedding, and each block's bias table
    image = torch.randn(2, 3, 64, 64)
    still = image.unsqueeze(2).expand(-1, -1, 16, -1, -1)
    torch.testing.assert_close(video(still), image_model(image), **CLOSE)


def test_bias_tables_of_other_windows_do_not_fit():
    for theirs, ours in (((2, 7, 7), (8, 7, 7)), ((1, 3, 3), (1, 8, 8))):
        donor, model = (tiny("video_swin_tiny", window_size=window) for window in (theirs, ours))
        with pytest.raises(WeightsError, match="mismatched  layers.0.blocks.0.attn.relative_position_bias"):
            load_weights(model, donor.state_dict(), fresh=())


def test_a_traced_graph_leaves_nothing_behind():
    model = tiny("video_swin_tiny", depths=[2, 1, 1, 1], window_size=(2, 3, 5)).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.randn(1, 3, 4, 52, 60))
    assert type(model(torch.randn(1, 3, 4, 52, 60))) is torch.Tensor


def test_stages_that_nobody_asked_for_are_not_run():
    model, run = tiny("video_swin_tiny"), []
    for i, stage in enumerate(model.layers, 1):
        stage.register_forward_hook(lambda *_, i=i: run.append(i))
    model.grids(torch.randn(1, 3, 4, 64, 64), stages=(2,))
    assert run == [1, 2]


def test_an_stvit_from_a_dense_swin():
    dense, ours = shake(tiny("video_swin_tiny")), tiny(base_depth=2)
    report = load_weights(ours, dense.state_dict(), fresh=())
    replaced = {f"layers.2.blocks.{i}.attn.relative_position_bias_table" for i in range(2, 6)}
    assert set(report.dropped) == replaced
    state = dense.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


# --- published figures ---


@pytest.mark.parametrize(
    ("name", "parameters", "published"),
    [("small", 49_625_518, 5.83), ("base", 87_812_336, 10.26)],
)
def test_stvit_r_costs_what_was_published(name, parameters, published):
    with torch.device("meta"):
        model = create_model(f"stvit_r_swin_{name}", num_classes=1000, num_frames=1)
    assert sum(p.numel() for p in model.parameters()) == parameters
    cost = multiply_adds(model, num_frames=1, image_size=224) / 1e9
    assert 0.95 * published < cost <= published


@pytest.mark.parametrize(("name", "published"), [("tiny", 88), ("small", 166)])
def test_multiply_adds_of_video(name, published):
    with torch.device("meta"):
        dense, semantic = (
            create_model(f"{kind}video_swin_{name}", num_classes=400, num_frames=32)
            for kind in ("", "stvit_")
        )
    cost = multiply_adds(dense, num_frames=32, image_size=224)
    assert cost / 1e9 == pytest.approx(published, rel=0.005)
    assert 0.24 <= 1 - multiply_adds(semantic, num_frames=32, image_size=224) / cost <= 0.30


# --- windows against brute force ---

GRIDS = [((4, 6, 8), (2, 3, 4)), ((5, 7, 9), (2, 3, 4)), ((2, 11, 3), (4, 4, 4)), ((1, 13, 5), (1, 7, 7))]


@pytest.mark.parametrize(("size", "window"), GRIDS)
def test_merge_undoes_partition(size, window):
    x = windows.pad(torch.randn(2, *size, 3), window)
    parts = windows.partition(x, window)
    assert parts.shape[1] == window[0] * window[1] * window[2]
    assert windows.merge(parts, window, x.shape[1:4]).equal(x)
    first = x[1, : window[0], : window[1], : window[2]].flatten(0, 2)
    assert parts[len(parts) // 2].equal(first)


def brute_force(attention, x, shifted):
    """Window attention as one attention over the whole padded grid: who may see whom, pair by pair."""
    heads, (window, size) = attention.num_heads, (attention.window, x.shape[1:4])
    clamped = [min(n, w) for n, w in zip(size, window, strict=True)]
    shift = [w // 2 if shifted and n > w else 0 for n, w in zip(size, window, strict=True)]
    padded = [-(-n // w) * w for n, w in zip(size, clamped, strict=True)]
    grid = x.new_zeros(len(x), *padded, x.shape[-1])
    grid[:, : size[0], : size[1], : size[2]] = x
    places = list(itertools.product(*map(range, padded)))

    def where(place):
        """(which window and which side of the seam, the flat place in the window)."""
        moved = [(p - s) % n for p, s, n in zip(place, shift, padded, strict=True)]
        group = [m // w for m, w in zip(moved, clamped, strict=True)]
        group += [p < s for p, s in zip(place, shift, strict=True)]
        t, h, w = (m % n for m, n in zip(moved, clamped, strict=True))
        return group, (t * clamped[1] + h) * clamped[2] + w

    def coordinates(flat):
        """In the full window, as the released index has it."""
        return flat // (window[1] * window[2]), flat // window[2] % window[1], flat % window[2]

    groups, flats = zip(*map(where, places), strict=True)
    bias = torch.full((heads, len(places), len(places)), float("-inf"))
    for i, j in itertools.product(range(len(places)), repeat=2):
        if groups[i] == groups[j]:
            pairs = zip(coordinates(flats[i]), coordinates(flats[j]), window, strict=True)
            row = 0
            for a, b, w in pairs:
                row = row * (2 * w - 1) + a - b + w - 1
            bias[:, i, j] = attention.relative_position_bias_table[row]
    out = Attention.forward(attention, grid.flatten(1, 3), bias=bias).view_as(grid)
    return out[:, : size[0], : size[1], : size[2]]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("size", "window"), GRIDS)
def test_window_attention_is_brute_force(size, window, shifted):
    shift = tuple(n // 2 for n in window) if shifted else (0, 0, 0)
    attention = shake(WindowAttention(6, 2, window=window, shift=shift))
    x = torch.randn(2, *size, 6)
    with torch.no_grad():
        torch.testing.assert_close(attention(x), brute_force(attention, x, shifted))


@pytest.mark.parametrize(("size", "window"), GRIDS)
def test_shifted_windows_at_once_are_those_in_slabs(size, window):
    """Each window asks the same, whether grids are rolled (CUDA) or cut into slabs."""
    attention = shake(WindowAttention(6, 2, window=window, shift=tuple(n // 2 for n in window))).double()
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    x = windows.pad(x, windows.clamp_window(window, (0, 0, 0), size)[0]).requires_grad_()
    clamped, shift = windows.clamp_window(window, attention.shift, size)
    bias = windows.relative_bias(attention.relative_position_bias_table, window, clamped)
    slabs, rolled = (way(x, clamped, shift, bias) for way in (attention._in_slabs, attention._rolled))
    exactly = {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(rolled, slabs, **exactly)
    weights, inputs = torch.randn_like(slabs), [x, *attention.parameters()]
    gradients = [
        torch.autograd.grad((y * weights).sum(), inputs, retain_graph=True) for y in (slabs, rolled)
    ]
    torch.testing.assert_close(*gradients, **exactly)


def test_slabs_cover_the_grid_once():
    size, window, shift = (4, 9, 8), (2, 3, 4), (1, 1, 2)
    seen, x = torch.zeros(1, *size, 1), torch.randn(1, *size, 1)
    copy = torch.empty_like(x)
    slabs = windows.slabs(size, window, shift, x.device)
    for slab, _ in slabs:
        windows.put(seen, slab, windows.take(seen, slab) + 1)
        windows.put(copy, slab, windows.take(x, slab))
    assert seen.eq(1).all()
    assert copy.equal(x)
    assert sum(mask is None for _, mask in slabs) == 1


def around(i, window, size):
    first = min(max(window * i - 1, 0), max(size - window - 3, 0))
    return range(first, min(first + window + 3, size))


@pytest.mark.parametrize(("size", "window"), [*GRIDS, ((3, 14, 14), (3, 7, 7)), ((3, 15, 30), (2, 7, 7))])
def test_enlarged_windows_are_brute_force(size, window):
    x = torch.randn(2, *size, 3)
    found, expected = windows.enlarge(x, window), []
    counts = [-(-n // w) for n, w in zip(size, window, strict=True)]
    for b, i, j, k in itertools.product(range(2), *map(range, counts)):
        start = min(i * window[0], max(size[0] - window[0], 0))
        times = range(start, min(start + window[0], size[0]))
        rows, columns = around(j, window[1], size[1]), around(k, window[2], size[2])
        expected.append(torch.stack([x[b, t, r, c] for t in times for r in rows for c in columns]))
    assert found.equal(torch.stack(expected))


def test_enlarged_windows_of_the_paper():
    """14 x 14 patches: windows of 10 at stride 4."""
    rows = torch.arange(14.0).view(1, 1, 14, 1, 1).expand(1, 1, 14, 14, 1)
    parts = windows.enlarge(rows, (1, 7, 7)).view(2, 2, 10, 10)
    assert parts[:, 0, :, 0].tolist() == [list(range(0, 10)), list(range(4, 14))]


# --- semantic tokens in windows ---


@pytest.mark.parametrize("size", [(2, 6, 6), (3, 7, 5), (1, 2, 9)])
def test_semantic_windows_step_by_step(size):
    window, own, dim = (2, 3, 3), (2, 2, 2), 6
    layers = [shake(Block(dim, 2)) for _ in range(4)]
    semantic = shake(SemanticWindows(size, window, own, dim, centres=True))
    x = torch.randn(2, *size, dim)
    window = tuple(map(min, window, size))
    own = tuple(map(min, own, window))
    counts = [-(-n // w) for n, w in zip(size, window, strict=True)]
    padded = windows.pad(x, window)
    tokens = torch.empty(2, *(n * k for n, k in zip(counts, own, strict=True)), dim)
    assert tokens.shape[1:4] == semantic.tokens

    def part(grid, place, n):
        return grid[:, *(slice(i * k, i * k + k) for i, k in zip(place, n, strict=True))]

    def layer(block, q, kv):
        q = q + block.attn(block.norm1(q), block.norm1(kv))
        return q + block.mlp(block.norm2(q))

    places = list(itertools.product(*map(range, counts)))
    for place in places:
        patches = part(padded, place, window).movedim(-1, 1)
        part(tokens, place, own)[:] = nn.functional.adaptive_max_pool3d(patches, own).movedim(1, -1)
    for i, block in enumerate(layers):
        before = tokens.clone()
        if i % 2 == 0:
            for n, place in enumerate(places):
                mine = part(before, place, own).flatten(1, 3)
                seen = windows.enlarge(x, window).unflatten(0, (2, -1))[:, n]
                answer = layer(block, mine, torch.cat([mine, seen], 1) if i == 0 else mine)
                part(tokens, place, own)[:] = answer.view(2, *own, dim)
        else:
            mine = before + semantic.centres if i == 1 else before
            everything = [before.flatten(1, 3), x.flatten(1, 3)] if i == 1 else [before.flatten(1, 3)]
            tokens = layer(block, mine.flatten(1, 3), torch.cat(everything, 1)).view_as(before)
    with torch.no_grad():
        torch.testing.assert_close(semantic(x, layers), tokens)


def test_every_layer_projects_its_keys_once():
    """Overlapping windows share projections: a layer's products are those of its tokens and X alone."""
    semantic, layer = SemanticWindows((1, 14, 14), (1, 7, 7), (1, 3, 3), 16), Block(16, 1)
    with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        semantic(torch.randn(1, 1, 14, 14, 16), [layer])
    projections = counter.get_flop_counts()["Global"][torch.ops.aten.addmm] // 2
    n, m = 36, 196
    assert projections == (2 * n + 2 * (n + m) + 8 * n) * 16 * 16


def test_g_is_resized():
    table = torch.randn(1, 2, 4, 6, 3)
    assert resize_grid(table, (2, 4, 6)) is table
    for size in [(2, 9, 3), (5, 4, 6), (1, 2, 2)]:
        assert resize_grid(table, size).shape == (1, *size, 3)
        torch.testing.assert_close(resize_grid(torch.ones_like(table), size), torch.ones(1, *size, 3))
    columns = nn.functional.interpolate(table[:, 1].movedim(-1, 1), (8, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(resize_grid(table, (2, 8, 12))[:, 1], columns.movedim(1, -1))


@pytest.mark.parametrize("semantic_layers", [1, 2, 3])
def test_semantic_maps(semantic_layers):
    model = tiny(window_size=(2, 3, 3), semantic_tokens=(2, 2, 2), semantic_layers=semantic_layers,
                 image_size=112).eval()  # fmt: skip
    maps = model.semantic_maps(torch.randn(2, 3, 4, 112, 112))
    assert maps.shape == (2, 2 * 6 * 6, 2, 7, 7)
    torch.testing.assert_close(maps.sum((2, 3, 4)), torch.ones(2, 72))
    assert (maps >= 0).all()
    if (
        semantic_layers % 2
    ):  # the first token belongs to the first window, which sees rows and columns 0 to 5
        assert maps[:, 0, :, :6, :6].gt(0).all()
        assert maps[:, 0, :, 6:].eq(0).all()
        assert maps[:, 0, :, :, 6:].eq(0).all()


# --- models ---

NAMES = ["video_swin_tiny", "stvit_video_swin_tiny", "stvit_r_video_swin_small"]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("video_swin_tiny", {}),
        ("swin_tiny_patch4_window7_224", {"num_frames": 1}),
        ("stvit_video_swin_tiny", {}),
        ("stvit_video_swin_tiny", {"centres": True, "semantic_layers": 3, "layer_scale": 0.1}),
        ("stvit_video_swin_tiny", {"base_depth": 0, "semantic_layers": 1, "pool": "avg"}),
        ("stvit_swin_tiny", {"num_frames": 1, "checkpointing": True}),
        ("stvit_r_swin_small", {"num_frames": 1, "layer_scale": 0.1}),
        ("stvit_r_video_swin_base", {"centres": True, "depths": [1, 1, 12, 1], "layer_scale": 0.1}),
    ],
)
def test_every_parameter_gets_a_gradient(name, sizes):
    frames = sizes.get("num_frames", 6)
    window = (min(frames, 2), 2, 2)
    sizes = {"semantic_tokens": (window[0], 1, 2)} | sizes if "stvit" in name else sizes
    model = tiny(name, **{"num_frames": frames, "window_size": window} | sizes)
    logits = model(torch.randn(2, 3, frames, 70, 101))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("shape", [(3, 4, 64, 64), (3, 5, 75, 131), (3, 67, 90)])
@pytest.mark.parametrize("name", NAMES)
def test_features_of_the_stages(name, shape):
    model, clip = tiny(name).eval(), torch.randn(1, *shape)
    stages = (1, 2) if name.startswith("stvit_v") else (1, 2, 3, 4)
    frames = -(-shape[1] // 2) if len(shape) == 4 else 1
    with torch.no_grad():
        grids = model.grids(clip, stages=stages)
        for stage, grid in zip(stages, grids, strict=True):
            height, width = (-(-n // (2 << stage)) for n in shape[-2:])
            assert grid.shape == (1, frames, height, width, 8 << (stage - 1))
        assert model.grids(clip, stages=(2,))[0].equal(grids[1])
        pooled = model.norm(model.forward_features(clip)).mean((1, 2, 3))
        torch.testing.assert_close(model(clip), model.head(pooled))


@pytest.mark.parametrize("stages", [(3,), (1, 4)])
def test_stvit_has_no_patch_grid_after_its_semantic_layers(stages):
    with pytest.raises(ValueError, match=r"patch grids in stages 1 to 2"):
        tiny().grids(torch.randn(1, 3, 4, 64, 64), stages=stages)
    with pytest.raises(ValueError, match=r"stages=\(0,\).* 1 to 4"):
        tiny("video_swin_tiny").grids(torch.randn(1, 3, 4, 64, 64), stages=(0,))


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_a_clip_of_one_frame(name):
    model, image = tiny(name, num_frames=1).eval(), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(image), model(image.unsqueeze(2)))


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_fused(name):
    """No attention matrix is built: torch's flash kernel takes bias and masks too."""
    sizes = {"semantic_tokens": (2, 2, 2)} if "stvit" in name else {}
    model = tiny(name, num_frames=6, image_size=112, window_size=(2, 3, 3), **sizes).eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model(torch.randn(2, 3, 6, 112, 112))


def test_masks_made_in_inference_mode_serve_training():
    model = tiny("video_swin_tiny", window_size=(3, 2, 5))
    with torch.inference_mode():
        model(torch.randn(1, 3, 8, 65, 67))
    model(torch.randn(1, 3, 8, 65, 67)).sum().backward()


def test_dense_and_semantic_models_have_the_same_layers():
    dense, semantic = tiny(semantic_tokens=None).state_dict(), tiny(centres=True).state_dict()
    assert semantic.keys() - dense.keys() == {"layers.2.semantic.centres"}
    tables = {f"layers.2.blocks.{i}.attn.relative_position_bias_table" for i in (3, 4, 5)}
    assert dense.keys() - semantic.keys() == tables
    assert tiny("video_swin_tiny").state_dict().keys() == dense.keys()


def test_layer_decay_and_weight_decay():
    model = tiny(centres=True)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5, min_scale=0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == set(names.values())
    scale = {name: lr for name, (lr, _) in found.items()}
    assert scale["head.weight"] == scale["norm.weight"] == 1
    assert scale["layers.3.blocks.1.mlp.fc1.weight"] == 0.5
    assert scale["layers.2.semantic.centres"] == scale["layers.2.blocks.4.mlp.fc1.weight"]
    assert scale["layers.1.downsample.reduction.weight"] == scale["layers.1.blocks.0.attn.qkv.weight"]
    assert scale["patch_embed.proj.weight"] == 0.5**13
    for name, (_, decay) in found.items():
        spared = "bias_table" in name or "centres" in name or "norm" in name or name.endswith("bias")
        assert decay == (0 if spared else 0.05)


@pytest.mark.parametrize(
    ("name", "sizes", "parts"),
    [
        ("stvit_video_swin_tiny", {"semantic_tokens": (9, 3, 3)}, ("(9, 3, 3)", "(8, 7, 7)")),
        ("stvit_video_swin_tiny", {"base_depth": 5}, ("base_depth=5", "semantic_layers=2", "depth, 6")),
        ("stvit_r_video_swin_small", {"depths": [2, 2, 8, 2]}, ("[2, 2, 8, 2]", "units of 6")),
        ("stvit_r_video_swin_small", {"patch_size": (2, 8, 8)}, ("(2, 8, 8)", "(t, 4, 4)")),
        ("video_swin_tiny", {"depths": [2, 2]}, ("depths=[2, 2]", "4 numbers")),
        ("video_swin_tiny", {"num_heads": 3}, ("num_heads=3", "4 numbers")),
        ("video_swin_tiny", {"num_heads": [3, 3, 3, 3]}, ("8", "num_heads 3")),
        ("video_swin_tiny", {"window_size": (7, 7)}, ("window_size=(7, 7)", "3 numbers")),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit(name, sizes, parts):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (parts are checked)
        tiny(name, **sizes)
    for part in parts:
        assert part in str(error.value)


def test_drop_path_is_drawn_for_each_clip_not_for_each_window():
    semantic = SemanticWindows((2, 4, 4), (2, 2, 2), (1, 1, 1), 8, semantic_layers=1)
    layer = Block(8, 2, drop_path=0.5).train()
    x = torch.randn(32, 2, 4, 4, 8)
    tokens = semantic(x, [layer])
    changed = (tokens != semantic(x, [])).any(-1).flatten(1)  # (clips, windows)
    assert changed.shape == (32, 4)
    assert torch.equal(changed.all(1), changed.any(1))
    assert 16 < changed.all(1).sum() < 32  # dropped where attention and MLP both are: a quarter
