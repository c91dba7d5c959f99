"""STViT-R's backbone for detection: parity with the authors', and with brute force."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stvit_video import WeightsError, create_model, load_weights, multiply_adds
from stvit_video.models import windows
from stvit_video.models.swin import WindowAttention
from stvit_video.models.swin_detection import DetectionSwin, asked

FIXTURES = Path(__file__).parent / "fixtures"
CLOSE = {"atol": 1e-4, "rtol": 0}
STAGES = (1, 2, 3, 4)


def tiny(**sizes):
    sizes = {"embed_dim": 8, "depths": [2, 2, 6, 2], "num_heads": [1, 2, 4, 8]} | sizes
    return create_model("stvit_r_det_swin_small", **{"num_classes": 0} | sizes)


def shake(model):
    """Random weights under which every tensor matters to the output."""
    for name, parameter in model.named_parameters():
        gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        scale = 0.5 if parameter.ndim == 1 or "bias_table" in name else parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, gain, scale)
    return model.eval()


def tensors_of(name):
    shapes = json.loads((FIXTURES / name).read_text())
    counters = {"dtype": torch.long}
    return {
        name: torch.zeros(shape, **counters if name.endswith("num_batches_tracked") else {})
        for name, shape in shapes.items()
    }


# --- the authors' ---


@pytest.fixture(scope="module")
def reference():
    return load_file(FIXTURES / "stvit_r_det_reference.safetensors")


@pytest.fixture(scope="module")
def authors(reference):
    """A model with the reference's weights."""
    weights = {k: v.float() for k, v in reference.items() if k.startswith("weights/")}
    model = tiny().eval()
    state = {name.removeprefix("weights/"): tensor for name, tensor in weights.items()}
    assert load_weights(model, state, fresh=()).origin == "STViT-R"
    return model


@pytest.mark.parametrize("size", [(224, 224), (200, 328), (198, 357), (224, 300), (128, 640), (64, 96)])
def test_every_stage_is_the_authors(authors, reference, size):
    """The reference holds every eighth channel."""
    height, width = size
    i = torch.arange(3 * height * width, dtype=torch.float64)
    image = ((0.0137 * i).sin() + 0.5 * (0.00071 * i + 0.3).cos()).float().view(1, 3, height, width)
    with torch.no_grad():
        grids = authors.forward_features(image, stages=STAGES)
        for stage, grid in enumerate(grids):
            theirs = reference[f"out/{height}x{width}/stage{stage}"]
            torch.testing.assert_close(grid[:, 0, ..., ::8], theirs, **CLOSE)
        assert authors.grids(image, stages=(3,))[0].equal(grids[2])
        assert authors(image).equal(grids[3].mean((1, 2, 3)))


@pytest.mark.parametrize(("name", "parameters"), [("small", 48_857_862), ("base", 86_789_128)])
def test_as_many_parameters_as_the_authors(name, parameters):
    with torch.device("meta"):
        model = create_model(f"stvit_r_det_swin_{name}", num_classes=0)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_tensor_of_the_authors_checkpoints_finds_its_place():
    theirs = tensors_of("stvit_r_det_s_keys.json")
    model = create_model("stvit_r_det_swin_small", num_classes=0)
    report = load_weights(model, theirs, fresh=())
    assert report.loaded.keys() == model.state_dict().keys()
    assert len(report.loaded) == len(theirs) - 9 - 30  # index buffers; q and kv of 15 layers are joined
    assert set(report.dropped.values()) == {"recomputed from sizes"}
    detector = {f"backbone.{name}": tensor for name, tensor in theirs.items()}
    heads = ["neck.fpn_convs.0.conv.weight", "rpn_head.rpn_cls.bias", "roi_head.bbox_head.0.fc_reg.bias"]
    detector |= {name: torch.zeros(2) for name in heads}
    again = load_weights(model, {"state_dict": detector, "meta": {"epoch": 36}}, fresh=())
    assert again.loaded == report.loaded
    assert again.dropped == report.dropped | dict.fromkeys(heads, "(2,)")


def test_a_classifier_starts_a_detector():
    theirs = tensors_of("stvit_r_swin_s_keys.json")
    model = create_model("stvit_r_det_swin_small", num_classes=0)
    with pytest.raises(WeightsError, match="missing     norms.0.weight") as error:
        load_weights(model, theirs, fresh=())
    assert "norms for every stage: they can be trained (fresh: norms)" in str(error.value)
    report = load_weights(model, theirs, fresh=("norms",))
    norms = {f"norms.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}
    assert set(report.fresh) == norms
    assert report.loaded.keys() == model.state_dict().keys() - norms
    dropped = {name for name, what in report.dropped.items() if what != "recomputed from sizes"}
    assert dropped == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_a_norm_that_the_model_lacks_is_no_stray():
    """What only a classifier's last norm may be: left out, if the model has norms for its stages."""
    state = shake(tiny()).state_dict()
    with pytest.raises(WeightsError, match="unexpected  norms.4.weight"):
        load_weights(tiny(), state | {"norms.4.weight": torch.ones(8)}, fresh=())


# --- windows and masks ---


@pytest.mark.parametrize("size", [(1, 7, 7), (1, 4, 6), (1, 7, 15), (1, 16, 3)])
def test_windows_that_are_not_clamped(size):
    """Shifted although they are the only one; who may see whom, pair by pair."""
    attention = WindowAttention(4, 2, window=(1, 7, 7), shift=(0, 3, 3))
    attention.clamped = False
    shake(attention)
    x = torch.randn(2, *size, 4)
    full = windows.pad(x, (1, 7, 7))
    height, width = full.shape[2:4]
    places = list(itertools.product(range(height), range(width)))

    def group(place):
        """Window and region of a place, after the map was rolled by 3."""
        moved = [(p - 3) % n for p, n in zip(place, (height, width), strict=True)]
        regions = [(m >= n - 7) + (m >= n - 3) for m, n in zip(moved, (height, width), strict=True)]
        return [m // 7 for m in moved], regions, [m % 7 for m in moved]

    bias = torch.full((2, len(places), len(places)), float("-inf"))
    groups = [group(place) for place in places]
    for (i, a), (j, b) in itertools.product(enumerate(groups), repeat=2):
        if a[:2] == b[:2]:
            down, right = (m - n + 6 for m, n in zip(a[2], b[2], strict=True))
            bias[:, i, j] = attention.relative_position_bias_table[down * 13 + right]
    expected = super(WindowAttention, attention).forward(full.flatten(1, 3), bias=bias).view_as(full)
    with torch.no_grad():
        torch.testing.assert_close(attention(x), expected[:, :, : size[1], : size[2]])
    slabs, rolled = (
        way(full, (1, 7, 7), (0, 3, 3), torch.zeros(1, 2, 49, 49))
        for way in (attention._in_slabs, attention._rolled)
    )
    torch.testing.assert_close(slabs, rolled)


MAPS = [(14, 14), (13, 23), (14, 19), (8, 40), (4, 6), (20, 7)]


@pytest.mark.parametrize("reach", [(3, 4), (7, 7), (12, 12)])
@pytest.mark.parametrize(("height", "width"), MAPS)
def test_masks_are_the_released_ones_as_executed(height, width, reach):
    """What a softmax of -1000 and 0 gives to each place of the map, and to all padding together."""
    missing = -height % 7, -width % 7
    size, n = (height, width), 7
    if reach[0] == 12:  # recovery: semantic tokens, 3 x 3 a window, masked by the map's missing rows
        size, n = tuple(-(-m // 7) * 3 for m in size), 3
    seen = asked(size, n, reach, missing, torch.device("cpu"))
    rows, columns = (-(-m // n) * n for m in size)
    mask = torch.zeros(rows, columns)
    mask[-missing[0] :, -missing[1] :] = -1000
    counts = list(itertools.product(range(rows // n), range(columns // n)))
    assert seen.shape == (len(counts), 1 + size[0] * size[1])
    for (i, j), ours in zip(counts, seen, strict=True):
        logits, places = [], []
        for r in range(i * n - reach[0], (i + 1) * n + reach[1]):
            for c in range(j * n - reach[0], (j + 1) * n + reach[1]):
                logits.append(float(mask[r, c]) if 0 <= r < rows and 0 <= c < columns else -1000.0)
                inside = 0 <= r < size[0] and 0 <= c < size[1]
                places.append(1 + r * size[1] + c if inside else 0)
        theirs = torch.zeros(len(ours)).index_add(0, torch.tensor(places), torch.tensor(logits).softmax(0))
        torch.testing.assert_close(ours / ours.sum(), theirs)


def test_padding_to_multiples_of_four_is_the_models(authors):
    image = torch.randn(1, 3, 61, 90)
    padded = nn.functional.pad(image, (0, 2, 0, 3))
    with torch.no_grad():
        for grid, same in zip(authors.grids(image), authors.grids(padded), strict=True):
            assert grid.equal(same)


def test_a_window_sees_as_far_as_its_keys_reach():
    """Of 63 x 7 patches, a change in the first window's is seen by the tokens and patches it can reach."""
    stage = shake(tiny(layer_scale=1.0)).layers[2].double()
    x = torch.randn(1, 1, 7, 63, 32, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, :, 0] = torch.randn(1, 1, 7, 32)

    def windows_changed(layers):
        tokens = [stage.semantic(grid, stage.blocks[1 : 1 + layers]) for grid in (x, changed)]
        return (tokens[0] != tokens[1]).any(-1).view(3, 9, 3).any(2).any(0).tolist()

    with torch.no_grad():
        assert windows_changed(1) == [True] + 8 * [False]  # the next one sees 3 patches before it
        assert windows_changed(2) == [True] * 2 + 7 * [False]
        tokens = stage.semantic(x, stage.blocks[1:4])
        other = tokens.clone()
        other[:, :, :, :3] = torch.randn(1, 1, 3, 3, 32)
        grids = [stage.semantic.recover(x, t, stage.blocks[5]) for t in (tokens, other)]
    seen = (grids[0] != grids[1]).any(-1)[0, 0].all(0)
    assert seen.tolist() == 35 * [True] + 28 * [False]  # its window and four more


# --- the model ---


@pytest.mark.parametrize("size", [(64, 96), (61, 239), (9, 500), (224, 224)])
def test_an_image_is_itself_in_a_batch(authors, size):
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        together = authors.grids(images)
        for i, image in enumerate(images):
            for grid, single in zip(together, authors.grids(image[None]), strict=True):
                torch.testing.assert_close(grid[i : i + 1], single, **CLOSE)
        for stage, grid in enumerate(together):
            down, right = (-(-n // (4 << stage)) for n in size)
            assert grid.shape == (3, 1, down, right, 8 << stage)


@pytest.mark.parametrize("depth", [6, 12])
def test_every_parameter_gets_a_gradient(depth):
    model = tiny(depths=[2, 2, depth, 2], checkpointing=depth == 12, layer_scale=0.1)
    sum(grid.square().sum() for grid in model.train().grids(torch.randn(2, 3, 118, 150))).backward()
    sums = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert sums == []
    assert [n for n, p in model.named_parameters() if not p.grad.any()] == []


def test_drop_path_rises_over_all_blocks():
    model = tiny(drop_path=0.2)
    rates = [b.drop_path.rate for stage in model.layers for b in stage.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.2, 12).tolist())
    assert rates[-1] == pytest.approx(0.2)


def test_semantic_maps():
    model = tiny().eval()
    maps = model.semantic_maps(torch.randn(2, 3, 112, 448))
    assert maps.shape == (2, 3 * 12, 1, 7, 28)
    torch.testing.assert_close(maps.sum((2, 3, 4)), torch.ones(2, 36))
    assert maps[:, 0, ..., :14].gt(0).all()  # its window and the next
    assert maps[:, 0, ..., 14:].eq(0).all()


def test_a_traced_graph_leaves_nothing_behind():
    model, image = tiny().eval(), torch.randn(1, 3, 72, 130)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(image)
        assert type(model(image)) is torch.Tensor


def test_masks_made_in_inference_mode_serve_training():
    model = tiny()
    with torch.inference_mode():
        model(torch.randn(1, 3, 65, 67))
    model(torch.randn(1, 3, 65, 67)).sum().backward()


@pytest.mark.parametrize("name", ["small", "base"])
def test_a_quarter_of_the_multiply_adds_is_saved(name):
    """On an image as detectors take them."""
    with torch.device("meta"):
        models = [
            create_model(full, num_classes=0)
            for full in (f"swin_{name}_patch4_window7_224", f"stvit_r_det_swin_{name}")
        ]
    dense, ours = (multiply_adds(model, num_frames=1, image_size=(800, 1216)) for model in models)
    assert 0.25 <= 1 - ours / dense <= 0.35


def test_the_dense_backbone_of_the_layout():
    model = tiny(semantic_tokens=None).eval()
    assert isinstance(model, DetectionSwin)
    assert [grid.shape[2] for grid in model.grids(torch.randn(1, 3, 64, 64))] == [16, 8, 4, 2]


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"depths": [2, 2, 8, 2]}, ("[2, 2, 8, 2]", "units of 6")),
        ({"num_frames": 2}, ("num_frames=2", "images")),
        ({"window_size": (2, 7, 7)}, ("window_size=(2, 7, 7)", "(1, n, n)")),
        ({"window_size": (1, 7, 8)}, ("window_size=(1, 7, 8)", "(1, n, n)")),
        ({"window_size": (7, 7)}, ("window_size=(7, 7)", "(1, n, n)")),
        ({"semantic_tokens": (1, 3, 2)}, ("semantic_tokens=(1, 3, 2)", "(1, n, n)")),
        ({"semantic_tokens": (1, 8, 8)}, ("(1, 8, 8)", "(1, 7, 7)")),
        ({"patch_size": (2, 4, 4)}, ("patch_size=(2, 4, 4)", "(1, n, n)")),
        ({"patch_size": (1, 8, 8)}, ("(1, 8, 8)", "(t, 4, 4)")),
    ],
)
def test_sizes_that_do_not_fit(sizes, parts):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (parts are checked)
        tiny(**sizes)
    for part in parts:
        assert part in str(error.value)


def test_inputs_and_stages_that_do_not_fit():
    model = tiny()
    for shape, part in (((1, 3, 2, 32, 32), "images"), ((1, 1, 32, 32), r"\(1, 1, 32, 32\)")):
        with pytest.raises(ValueError, match=part):
            model(torch.randn(shape))
    with pytest.raises(ValueError, match=r"stages=\(0,\).* 1 to 4"):
        model.grids(torch.randn(1, 3, 32, 32), stages=(0,))
