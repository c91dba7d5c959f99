"""Weights of others, proved by what comes out; and damage, which never passes for weights."""

import copy
import json
import os
import random
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stvit_video import LoadReport, WeightsError, build, cli, create_model, load_weights
from stvit_video.adapters import IMAGENET, Pixels
from stvit_video.build import build_model
from stvit_video.config import Config, DataConfig, make_parser, parse, resolve, to_dict
from stvit_video.engine.checkpoint import FORMAT
from stvit_video.hub import pixels_by_name
from stvit_video.models.embed import sincos_table
from stvit_video.weights import resize_grid

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parents[1]
SMALL = {"patch_size": (2, 8, 8), "embed_dim": 24, "depth": 4, "num_heads": 2, "base_depth": 1}
IMAGE = SMALL | {"patch_size": (1, 8, 8)}
FRESH = ("head", "centres")


def video(num_classes=5, **sizes):
    """A small video STViT, 4 x 32 x 32; semantic_tokens=None: dense."""
    sizes = {"semantic_tokens": (2, 2, 2), "num_frames": 4, "image_size": 32} | SMALL | sizes
    return create_model("stvit_tiny_patch16_224", num_classes=num_classes, **sizes).eval()


def image(num_classes=5, **sizes):
    sizes = {"num_frames": 1, "semantic_tokens": (1, 2, 2), "patch_size": (1, 8, 8)} | sizes
    return video(num_classes, **sizes)


def timm_vit(**options):
    """A small timm ViT for 32 x 32 images with no parameter at zero."""
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2} | options
    return scattered(timm.create_model("vit_tiny_patch16_224", num_classes=5, **options)).eval()


def scattered(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def wave(*shape):
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (torch.sin(0.0137 * i) + 0.5 * torch.cos(0.00071 * i + 0.3)).float().view(shape)


def reference(name):
    tensors = load_file(FIXTURES / f"{name}_reference.safetensors")
    weights = {
        k.removeprefix("weights/"): t.float() for k, t in tensors.items() if k.startswith("weights/")
    }
    return weights, tensors["out/logits"]


def apart(model, x, logits):
    with torch.no_grad():
        return (model(x) - logits).abs().max().item()


# ---- pixels


HALF = Pixels((0.5,) * 3, (0.5,) * 3)


def settled(report, **data):
    """The pixels of a run whose weights gave that report."""
    data = build.with_pixels(Config(data=DataConfig(preset="kinetics", **data)), report).data
    return Pixels(data.mean, data.std, data.interpolation)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [("vit_tiny_patch16_224.augreg_in21k_ft_in1k", HALF), ("deit_tiny_patch16_224.fb_in1k", IMAGENET)],
)
def test_weights_of_timm_bring_their_pixels(monkeypatch, name, pixels):
    """Both were trained on frames resized bicubically."""
    monkeypatch.setattr("stvit_video.weights.from_timm", lambda name: timm_vit().state_dict())
    report = load_weights(image(semantic_tokens=None, depth=3), f"timm:{name}")
    assert report.pixels == settled(report) == pixels._replace(interpolation="bicubic")
    assert not report.notes


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("vit_tiny_patch16_224_in1k.safetensors", HALF),
        ("vit_large_patch16_224_in21k.bin", HALF),  # two of them, both with 0.5
        ("vit_base_patch16_224.mae.pth", IMAGENET),
        ("deit_small_patch16_224-cd65a155.pth", IMAGENET),
        ("vit_base_patch16_224.pth", None),  # AugReg's and DINO's differ
        ("vit_small_patch16_224_mocov3.pth", None),
        ("vit_large_patch16_224_ft.pth", None),  # tuned from whatever it was
        ("model.safetensors", None),
    ],
)
def test_a_file_with_a_name_of_timms_brings_its_pixels(name, pixels):
    assert pixels_by_name(f"runs/{name}") == (pixels and pixels._replace(interpolation="bicubic"))


def test_pixels_taken_by_a_files_name_are_told(tmp_path):
    path = tmp_path / "vit_tiny_patch16_224_in1k.pth"
    torch.save(timm_vit().state_dict(), path)
    report = load_weights(image(semantic_tokens=None, depth=3), path)
    assert settled(report) == HALF._replace(interpolation="bicubic")
    assert report.notes == ["its file has a name of timm's: mean, std and interpolation are taken so"]


def test_a_checkpoint_brings_its_normalisation(tmp_path):
    values = own_checkpoint()
    values["config"]["data"] |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    values["config"]["data"].pop("interpolation")  # as in version 0.4.0
    report = load_weights(video(semantic_tokens=(2, 2, 2)), values)
    assert settled(report) == HALF
    report.write(tmp_path / "weights.json")
    written = json.loads((tmp_path / "weights.json").read_text())
    assert written["pixels"] == {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    values["config"]["data"]["interpolation"] = "bicubic"
    assert settled(load_weights(video(), values)) == HALF._replace(interpolation="bicubic")


def test_a_contradicted_or_unknown_normalisation_is_told():
    report = LoadReport("x.pth", "VideoMAE", pixels=IMAGENET)
    assert settled(report, mean=(0.45,) * 3) == Pixels((0.45,) * 3, IMAGENET.std)
    assert "was trained with mean [0.485" in report.notes[0]
    settled(report := LoadReport("x.pth", "timm", pixels=HALF), interpolation="bicubic")
    assert "std [0.5, 0.5, 0.5], bilinear, and is given" in report.notes[0]
    report = LoadReport("x.pth", "timm ViT")
    assert settled(report) == IMAGENET  # the preset's
    assert "does not say" in report.notes[0]


# ---- parity with other implementations


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_timm_averaged_without_class_token(name):
    theirs = scattered(timm.create_model(name, global_pool="avg", class_token=False, num_classes=7)).eval()
    ours = create_model("vit_tiny_patch16_224", num_classes=7, num_frames=1).eval()
    report = load_weights(ours, theirs.state_dict(), fresh=())
    x = torch.randn(1, 3, 224, 224)
    assert apart(ours, x, theirs(x)) <= 1e-5
    assert len(report.loaded) == len(ours.state_dict())
    assert not report.dropped


def test_a_class_token_is_dropped_and_told():
    theirs = timm.create_model("vit_tiny_patch16_224")
    ours = create_model("vit_tiny_patch16_224", num_classes=1000, num_frames=1)
    report = load_weights(ours, theirs.state_dict())
    assert report.dropped == {"cls_token": "(1, 1, 192)", "pos_embed[:, :1]": "(1, 1, 192)"}
    assert "cls_token" in str(report)
    state = theirs.state_dict()
    assert torch.equal(ours.pos_embed.flatten(1, 3), state["pos_embed"][:, 1:])
    assert torch.equal(ours.fc_norm.weight, state["norm.weight"])
    assert torch.equal(ours.head.bias, state["head.bias"])


def test_register_tokens_and_layer_scale_like_dinov2():
    options = {"class_token": True, "reg_tokens": 4, "no_embed_class": True, "init_values": 0.3}
    theirs = timm_vit(**options)
    dense = image(semantic_tokens=None, depth=3)
    report = load_weights(dense, theirs.state_dict())
    assert report.dropped["reg_token"] == "(1, 4, 24)"
    assert torch.equal(dense.pos_embed.flatten(1, 3), theirs.pos_embed)
    # by value, without the tokens: a model that has the scale, and one that folds it into its weights
    theirs = timm_vit(class_token=False, global_pool="avg", init_values=0.3)
    x = torch.randn(2, 3, 32, 32)
    for layer_scale in (None, 1e-5):
        ours = image(semantic_tokens=None, depth=3, layer_scale=layer_scale)
        load_weights(ours, theirs.state_dict(), fresh=())
        assert apart(ours, x, theirs(x)) <= 1e-5


@pytest.mark.parametrize("sizes", [{"videomae_vit": (48, 4, 4)}, {"videomae_hugging_face": (24, 3, 2)}])
def test_videomae(sizes):
    [(name, (width, depth, ratio))] = sizes.items()
    weights, logits = reference(name)
    sizes = {"embed_dim": width, "depth": depth, "num_heads": 3, "mlp_ratio": ratio, "num_frames": 8}
    dense = video(semantic_tokens=None, pos_embed="sincos", **sizes)
    load_weights(dense, weights, fresh=())
    assert apart(dense, wave(2, 3, 8, 32, 32), logits) <= 1e-4
    biases = ("q_bias", "v_bias", "query.bias", "value.bias")  # they matter
    changed = {k: torch.zeros_like(t) if k.endswith(biases) else t for k, t in weights.items()}
    load_weights(dense, changed, fresh=())
    assert apart(dense, wave(2, 3, 8, 32, 32), logits) > 1e-2
    # a learned table starts from the fixed one
    learned = video(semantic_tokens=None, **sizes)
    report = load_weights(learned, weights, fresh=())
    assert "fixed sine-cosine" in report.fresh["pos_embed"]
    assert apart(learned, wave(2, 3, 8, 32, 32), logits) <= 1e-4


def videomae_sizes():
    return {"embed_dim": 48, "num_heads": 3, "mlp_ratio": 4.0, "num_frames": 8, "pos_embed": "sincos"}


def test_videomae_pretrained_encoder():
    weights, _ = reference("videomae_vit")
    weights = {k: t for k, t in weights.items() if not k.startswith("head.")}
    pretrained = {f"encoder.{k.replace('fc_norm', 'norm')}": t for k, t in weights.items()}
    pretrained |= {"encoder_to_decoder.weight": torch.ones(2, 48), "mask_token": torch.ones(1, 1, 2)}
    pretrained |= {"decoder.blocks.0.attn.q_bias": torch.ones(2), "decoder.head.weight": torch.ones(2, 2)}
    model = video(semantic_tokens=None, **videomae_sizes())
    report = load_weights(model, {"model": pretrained, "epoch": 800})
    assert set(report.fresh) == {"head.weight", "head.bias"}
    assert len(report.dropped) == 4
    q, k, v = model.blocks[1].attn.qkv.bias.chunk(3)
    assert torch.equal(q, weights["blocks.1.attn.q_bias"])
    assert torch.equal(v, weights["blocks.1.attn.v_bias"])
    assert not k.any()
    assert torch.equal(model.fc_norm.bias, weights["fc_norm.bias"])


def test_hugging_face_spells_biases_in_two_ways():
    weights, _ = reference("videomae_hugging_face")
    older = {
        k.replace("attention.query.bias", "attention.q_bias").replace(
            "attention.value.bias", "attention.v_bias"
        ): t
        for k, t in weights.items()
    }
    assert older.keys() != weights.keys()
    sizes = {"depth": 3, "num_heads": 3, "mlp_ratio": 2.0, "num_frames": 8, "pos_embed": "sincos"}
    models = [video(semantic_tokens=None, **sizes) for _ in range(3)]
    bare = {k.removeprefix("videomae."): t for k, t in older.items() if k.startswith("videomae.")}
    bare |= {"layernorm.weight": weights["fc_norm.weight"], "layernorm.bias": weights["fc_norm.bias"]}
    for model, state in zip(models, (weights, older, bare), strict=True):
        load_weights(model, state)
    x = torch.randn(1, 3, 8, 32, 32)
    assert apart(models[0], x, models[1](x)) == 0
    assert torch.equal(models[0].forward_features(x), models[2].forward_features(x))


def mae_st(dense):
    """The dense model's weights as MAE-ST would hold them; its positions become a sum."""
    space, time = torch.randn(1, 16, 24), torch.randn(1, 2, 24)
    with torch.no_grad():
        dense.pos_embed.copy_((time[:, :, None] + space[:, None]).view(1, 2, 4, 4, 24))
    theirs = {
        "pos_embed_spatial": space,
        "pos_embed_temporal": time,
        "pos_embed_class": torch.ones(1, 1, 24),
    }
    theirs["cls_token"] = torch.ones(1, 1, 24)
    for name, tensor in dense.state_dict().items():
        if ".qkv." in name:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            theirs |= {name.replace("qkv", part): t for part, t in parts}
        elif name != "pos_embed":
            theirs[name.replace("fc_norm", "norm")] = tensor
    return theirs


def test_mae_st():
    dense, ours = scattered(video(semantic_tokens=None)), video(semantic_tokens=None)
    report = load_weights(ours, {"model_state": mae_st(dense)}, fresh=())
    assert report.origin == "MAE-ST"
    x = torch.randn(1, 3, 4, 32, 32)
    assert apart(ours, x, dense(x)) <= 1e-6


def test_space_time_attention_is_not_dropped_in_silence():
    state = {f"model.{k}": t for k, t in video(semantic_tokens=None).state_dict().items()}
    state["model.blocks.0.temporal_attn.qkv.weight"] = torch.zeros(72, 24)
    with pytest.raises(WeightsError, match=r"unexpected\s+model.blocks.0.temporal_attn"):
        load_weights(video(semantic_tokens=None), state)


# ---- from images to video


@pytest.mark.parametrize("inflate", ["average", "centre"])
def test_a_still_clip_equals_the_image(inflate):
    images = scattered(image(semantic_tokens=None))
    clips = video(semantic_tokens=None)
    report = load_weights(clips, images.state_dict(), inflate=inflate, fresh=())
    assert set(report.inflated) == {"patch_embed.proj.weight"}
    assert set(report.resized) == {"pos_embed"}
    x = torch.randn(2, 3, 32, 32)
    still = x.unsqueeze(2).expand(-1, -1, 4, -1, -1)
    with torch.no_grad():
        patches = clips.patch_embed(still)
        assert (patches - images.patch_embed(x)).abs().max() <= 1e-5
        assert apart(clips, still, images(x)) <= 1e-4


def test_the_rules_of_inflation_differ_where_the_clip_moves():
    images = scattered(image(semantic_tokens=None))
    average, centre = video(semantic_tokens=None), video(semantic_tokens=None)
    load_weights(average, images.state_dict())
    load_weights(centre, images.state_dict(), inflate="centre")
    kernel = images.patch_embed.proj.weight
    assert torch.equal(average.patch_embed.proj.weight, kernel.repeat(1, 1, 2, 1, 1) / 2)
    assert torch.equal(centre.patch_embed.proj.weight[:, :, 1], kernel[:, :, 0])
    assert not centre.patch_embed.proj.weight[:, :, 0].any()
    with pytest.raises(ValueError, match="inflate='both' is none of"):
        load_weights(average, images.state_dict(), inflate="both")


def test_an_stvit_from_a_dense_checkpoint():
    theirs = timm_vit(depth=4)
    ours = video()
    before = ours.semantic.centres.clone()
    report = load_weights(ours, theirs.state_dict(), fresh=("head", "centres"))
    assert set(report.fresh) == {"semantic.centres"}  # the head has 5 classes too: it fits, and is loaded
    state = theirs.state_dict()
    for name in ours.blocks.state_dict():
        assert torch.equal(ours.state_dict()[f"blocks.{name}"], state[f"blocks.{name}"])
    assert torch.equal(ours.semantic.centres, before)
    other_classes = video(num_classes=8)
    report = load_weights(other_classes, theirs.state_dict())
    assert set(report.fresh) == {"semantic.centres", "head.weight", "head.bias"}


def test_an_image_stvit_into_a_video_stvit():
    images, clips = scattered(image()), video()
    report = load_weights(clips, images.state_dict(), fresh=())
    assert set(report.resized) == {"pos_embed", "semantic.centres"}
    assert torch.equal(clips.semantic.centres, images.semantic.centres.repeat(1, 2, 1, 1, 1))


@pytest.mark.parametrize("frames", [1, 4])
def test_weights_of_other_patches_give_a_resized_patch_the_same_token(frames):
    images, larger = image(), video if frames > 1 else image
    model = larger(patch_size=(2 if frames > 1 else 1, 12, 12), image_size=48)
    report = load_weights(model, images.state_dict(), fresh=("centres",))
    assert "patch_embed.proj.weight" in report.inflated | report.resized
    patch = torch.randn(1, 3, 8, 8)
    grown = nn.functional.interpolate(patch, size=(12, 12), mode="bicubic", antialias=True)
    clip = grown[:, :, None].expand(-1, -1, model.patch_embed.proj.kernel_size[0], -1, -1)
    token = images.patch_embed.proj(patch[:, :, None])
    torch.testing.assert_close(model.patch_embed.proj(clip), token, atol=1e-4, rtol=1e-4)


def test_the_image_recipe_feeds_the_video_recipe():
    models = []
    for name in ("in1k_stvit", "k400_stvit"):
        config, _ = parse(make_parser(""), ["--cfg", str(ROOT / "configs" / f"{name}.yaml")])
        config = resolve(config)
        models.append((config, build_model(config, config.data.num_classes)))
    (config, images), (_, clips) = models
    values = checkpoint(images, config, [f"class {i}" for i in range(1000)])
    report = load_weights(clips, values, class_names=[f"action {i}" for i in range(400)])
    assert set(report.fresh) == {"head.weight", "head.bias"}
    assert set(report.inflated) == {"patch_embed.proj.weight"}


def test_positions_are_resized_in_space_and_time():
    table = torch.randn(1, 1, 4, 4, 6)
    assert torch.equal(resize_grid(table, (3, 4, 4)), table.repeat(1, 3, 1, 1, 1))
    # a ramp in time stays a ramp; interpolation holds the ends
    ramp = torch.arange(4.0).view(1, 4, 1, 1, 1).expand(1, 4, 2, 3, 5)
    assert torch.allclose(resize_grid(ramp, (2, 2, 3))[0, :, 0, 0, 0], torch.tensor([0.5, 2.5]))
    # each axis keeps its meaning: what depends on the row alone depends on the row alone after resizing
    rows = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, 2, 4, 6, 3)
    out = resize_grid(rows, (2, 8, 3))
    assert out.shape == (1, 2, 8, 3, 3)
    assert (out - out[:, :1, :, :1, :1]).abs().max() < 1e-5
    assert (out[0, 0, 1:, 0, 0] > out[0, 0, :-1, 0, 0]).all()
    small, large = image(), image(image_size=64)
    report = load_weights(large, small.state_dict(), fresh=())
    assert set(report.resized) == {"pos_embed"}


# ---- files: nesting, prefixes, what is refused


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_files(tmp_path, suffix):
    theirs, path = scattered(video()), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(theirs.state_dict(), path)
    else:
        torch.save(theirs.state_dict(), path)
    ours = video()
    report = load_weights(ours, path, fresh=())
    assert all(torch.equal(t, theirs.state_dict()[k]) for k, t in ours.state_dict().items())
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["loaded"].keys() == ours.state_dict().keys()
    assert written["source"] == str(path)


@pytest.mark.parametrize("nesting", ["model", "module", "state_dict", "model_state", "model_ema"])
@pytest.mark.parametrize("prefix", ["module.", "backbone.", "encoder.", "_orig_mod.", "module._orig_mod."])
def test_nesting_and_prefixes(nesting, prefix):
    theirs, ours = video(), video()
    state = {prefix + k: t for k, t in theirs.state_dict().items()}
    load_weights(ours, {"epoch": 3, nesting: state}, fresh=())
    assert torch.equal(ours.head.weight, theirs.head.weight)


class Trap:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_but_tensors_is_unpickled(tmp_path):
    trap = Trap()
    trap.path = str(tmp_path / "sprung")
    torch.save({"model": video().state_dict(), "args": trap}, tmp_path / "trap.pth")
    with pytest.raises(WeightsError, match=r"trap.pth: holds \S*mkdir beside tensors.*convert it once"):
        load_weights(video(), tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


def wrong_files(folder):
    good = folder / "good.pth"
    torch.save(video().state_dict(), good)
    save_file(video().state_dict(), folder / "good.safetensors")
    whole, safe = good.read_bytes(), (folder / "good.safetensors").read_bytes()
    contents = {
        "truncated.pth": whole[: len(whole) // 2],
        "truncated.safetensors": safe[: len(safe) // 2],
        "empty.pt": b"",
        "text.pth": b"path label\n" * 40,
        "text.safetensors": b"path label\n" * 40,
        "flipped.pth": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    torch.save([1, 2], folder / "list.pth")
    torch.save({"model": {"a": 1}}, folder / "number.pth")
    torch.save({}, folder / "nothing.pth")
    (folder / "folder.pth").mkdir()
    torch.save({"a": torch.tensor([float("nan")])}, folder / "nan.pth")
    return [*sorted(p for p in folder.iterdir() if not p.name.startswith("good")), folder / "none.pth"]


def test_wrong_files_are_told_in_one_line(tmp_path):
    model = video()
    before = copy.deepcopy(model.state_dict())
    for path in wrong_files(tmp_path):
        with pytest.raises(WeightsError) as caught:
            load_weights(model, path)
        assert str(caught.value).startswith(str(path)), caught.value
        assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_timm_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match="timm has no such model .did you mean 'vit_tiny_patch16_224'"):
        load_weights(video(), "timm:vit_tiny_patch16_225")

    def unreachable(name, pretrained):
        raise ConnectionError(f"{name} cannot be reached\nwith a long story")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(WeightsError, match=r"^timm:vit_tiny_patch16_224: cannot be fetched \([^\n]*\)$"):
        load_weights(video(), "timm:vit_tiny_patch16_224")


# ---- damage


def checkpoint(model, config, class_names):
    """What a run of this toolbox saves, as far as weights go."""
    values = {"format": FORMAT, "model": model.state_dict(), "ema": None, "class_names": class_names}
    return values | {"config": to_dict(config)}


def own_checkpoint(class_names=("a", "b", "c", "d", "e")):
    flags = ["--model.name=stvit_tiny_patch16_224", "--data.num_frames=4", "--data.image_size=32"]
    sizes = SMALL | {"semantic_tokens": (2, 2, 2)}
    flags += [f"--model.{key}={list(v) if isinstance(v, tuple) else v}" for key, v in sizes.items()]
    config, _ = parse(make_parser(""), flags)
    return checkpoint(scattered(video(len(class_names))), config, list(class_names))


def sources():
    """(model, state dict, a function that puts a state dict back into its file's contents) by origin."""
    own = own_checkpoint()
    mae, _ = reference("videomae_vit")
    face, _ = reference("videomae_hugging_face")
    bare = dict
    return {
        "own": (video(), own["model"], lambda state: own | {"model": state}),
        "timm": (image(semantic_tokens=None), timm_vit(depth=4).state_dict(), bare),
        "timm to video": (video(semantic_tokens=None), timm_vit(depth=4).state_dict(), bare),
        "videomae": (video(semantic_tokens=None, **videomae_sizes()), mae, bare),
        "mae-st": (video(semantic_tokens=None), mae_st(video(semantic_tokens=None)), bare),
        "hugging face": (
            video(
                semantic_tokens=None, depth=3, num_heads=3, mlp_ratio=2.0, num_frames=8, pos_embed="sincos"
            ),
            face,
            bare,
        ),
    }


def damages(tensor):
    """What can be wrong with one tensor: cut along any axis, or transposed where that shows."""
    for axis, size in enumerate(tensor.shape):
        yield f"cut along {axis}", tensor.narrow(axis, 0, size - 1)
        for other in range(axis):
            if size != tensor.shape[other]:
                yield f"{axis} and {other} exchanged", tensor.transpose(axis, other)


@pytest.mark.parametrize("origin", sources())
def test_every_damaged_tensor_is_caught(origin):
    model, state, whole = sources()[origin]
    load_weights(model, whole(state), fresh=())
    before = copy.deepcopy(model.state_dict())
    for name, tensor in state.items():
        if origin == "mae-st" and name in ("pos_embed_temporal", "pos_embed_class", "cls_token"):
            continue  # its clips may be shorter, its class token is not looked at
        others = {k: t for k, t in state.items() if k != name}
        variants = {"deleted": others, "renamed": others | {f"{name}_": tensor}}
        variants |= {how: others | {name: damaged} for how, damaged in damages(tensor)}
        for how, variant in variants.items():
            with pytest.raises(WeightsError):
                pytest.fail(f"{name} {how}: {load_weights(model, whole(variant), fresh=())}")
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_mutated_files_never_load_wrong_names(tmp_path, kind):
    """70 of each kind: an error, or the same names; and in a zip, whose checksums tell, the same values."""
    theirs, ours = scattered(video(num_classes=3, depth=2, embed_dim=12, semantic_layers=1)), None
    good = tmp_path / "good"
    if kind == "safetensors":
        save_file(theirs.state_dict(), good)
    else:
        torch.save(theirs.state_dict(), good, _use_new_zipfile_serialization=kind == "zip")
    whole, rng = good.read_bytes(), random.Random(kind)
    path = tmp_path / ("bad.safetensors" if kind == "safetensors" else "bad.pth")
    refused = 0
    for i in range(70):
        content = bytearray(whole)
        # half of them in the first bytes, where names and shapes stand
        place = rng.randrange(len(content) if i % 2 else min(len(content), 2500))
        content[place] ^= rng.randrange(1, 256)
        path.write_bytes(content)
        ours = video(num_classes=3, depth=2, embed_dim=12, semantic_layers=1)
        try:
            report = load_weights(ours, path, fresh=())
        except WeightsError:
            refused += 1
            continue
        assert report.loaded.keys() == theirs.state_dict().keys()
        if kind == "zip":
            assert all(torch.equal(t, theirs.state_dict()[k]) for k, t in ours.state_dict().items())
    assert refused >= 20


# ---- class names


def test_a_head_is_chosen_by_class_name():
    values = own_checkpoint(("run", "jump", "sit", "swim"))
    ours = video(num_classes=2)
    report = load_weights(ours, values, class_names=["swim", "jump"], fresh=())
    assert torch.equal(ours.head.weight, values["model"]["head.weight"][[3, 1]])
    assert torch.equal(ours.head.bias, values["model"]["head.bias"][[3, 1]])
    assert "rows chosen by class name" in str(report)


def test_a_head_of_other_classes_is_refused_or_fresh():
    values = own_checkpoint(("run", "jump", "sit", "swim"))
    ours = video(num_classes=4)
    before = ours.head.weight.clone()
    names = ["run", "jump", "sit", "fly"]
    with pytest.raises(WeightsError, match="its classes are not the model's(?s:.*)first: 'fly'"):
        load_weights(ours, values, class_names=names, fresh=())
    report = load_weights(ours, values, class_names=names)
    assert set(report.fresh) == {"head.weight", "head.bias"}
    assert torch.equal(ours.head.weight, before)


def test_a_checkpoint_with_averaged_weights_gives_those():
    values = own_checkpoint()
    values["ema"] = {k: t + 1 for k, t in values["model"].items()}
    ours = video()
    report = load_weights(ours, values, fresh=())
    assert torch.equal(ours.head.bias, values["ema"]["head.bias"])
    assert report.source.endswith("[ema]")


def test_heads_are_compared_where_they_are_known():
    with pytest.raises(WeightsError, match=r"blocks.0.attn.num_heads 2 -> 4"):
        load_weights(video(num_heads=4), own_checkpoint())


def test_what_a_checkpoint_was_built_with_decides():
    values = own_checkpoint()
    theirs = scattered(video(depth=5, num_heads=3))
    values |= {"model": theirs.state_dict(), "built": theirs.built}  # its settings say depth 4, 2 heads
    ours = create_model(**theirs.built).eval()
    load_weights(ours, values, fresh=())
    clip = torch.randn(1, 3, 4, 32, 32)
    assert ours(clip).equal(theirs(clip))
    with pytest.raises(WeightsError, match=r"num_heads 3 -> 2"):
        load_weights(video(depth=5), values)
    with pytest.raises(WeightsError, match=r"not what its settings make: unexpected blocks.4"):
        load_weights(ours, values | {"built": theirs.built | {"depth": 4}})
    for wrong in ({"built": 3}, {"built": {}}, {"built": theirs.built | {"depths": 3}}):
        with pytest.raises(WeightsError, match="not a complete checkpoint"):
            load_weights(ours, values | wrong)


def test_a_backbone_drops_a_head_and_a_model_misses_it():
    values, backbone = own_checkpoint(), video(num_classes=0)
    for source in (values, values["model"]):
        report = load_weights(backbone, source, fresh=())
        assert report.dropped.keys() == {"head.weight", "head.bias"}
        assert report.loaded.keys() == backbone.state_dict().keys()
    headless = values | {"model": backbone.state_dict(), "built": backbone.built}
    report = load_weights(video(), headless)
    assert report.fresh.keys() == {"head.weight", "head.bias"}
    with pytest.raises(WeightsError, match="missing     head.weight"):
        load_weights(video(), headless, fresh=())


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": torch.ones(3)},
        {"model": "x"},
        {"ema": [1]},
        {"class_names": 5},
        {"config": {"model": [], "data": {}}},
        {"config": {"model": {"name": "stvit_tiny_patch16_224", "num_heads": 0}, "data": {}}},
    ],
)
def test_a_toolbox_checkpoint_of_odd_contents_is_one_line(wrong):
    with pytest.raises(WeightsError) as caught:
        load_weights(video(), own_checkpoint() | wrong)
    assert "\n" not in str(caught.value)


def test_odd_tensors_and_nesting_are_told():
    state = video().state_dict()
    looped = {}
    looped["model"] = looped
    for odd in (torch.empty(5, device="meta"), torch.ones(5).to_sparse(), 3.0):
        with pytest.raises(WeightsError, match="head.bias"):
            load_weights(video(), state | {"head.bias": odd})
    with pytest.raises(WeightsError, match="not a state dict"):
        load_weights(video(), looped)


def test_two_tensors_for_one_place_are_not_chosen_between():
    twice = timm_vit(depth=4, init_values=0.1).state_dict()
    twice |= {f"blocks.{i}.gamma_1": torch.ones(24) for i in range(4)}
    mae, _ = reference("videomae_vit")
    mae |= {"blocks.0.attn.qkv.bias": torch.ones(144)}
    both = mae_st(video(semantic_tokens=None)) | {"pos_embed": torch.ones(1, 32, 24)}
    models = [image(semantic_tokens=None), video(semantic_tokens=None, **videomae_sizes())]
    for model, state in zip([*models, video(semantic_tokens=None)], (twice, mae, both), strict=True):
        with pytest.raises(WeightsError, match="unexpected"):
            load_weights(model, state, fresh=())


def test_a_relative_bias_that_matters_is_not_dropped():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5}
    beit = timm.models.beit.Beit(**sizes, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=1.0)
    with pytest.raises(WeightsError, match="unexpected  blocks.0.attn.relative_position_bias_table"):
        load_weights(image(semantic_tokens=None), beit.state_dict())


def test_a_flat_table_is_not_taken_for_another_grid():
    state = image(image_size=64, semantic_tokens=None).state_dict()  # 8 x 8 patches
    state["pos_embed"] = state["pos_embed"].flatten(1, 3)
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].squeeze(2)
    clips = video(num_frames=8, semantic_tokens=None)  # 4 x 4 x 4
    assert set(load_weights(clips, state, fresh=()).resized) == {"pos_embed"}
    state = clips.state_dict()
    state["pos_embed"] = state["pos_embed"].flatten(1, 3)
    load_weights(video(num_frames=8, semantic_tokens=None), state, fresh=())
    with pytest.raises(WeightsError, match=r"mismatched  pos_embed \(1, 64, 24\)"):
        load_weights(video(num_frames=16, semantic_tokens=None), state, fresh=())


def test_a_baseline_of_pytorchvideo_comes_back():
    sizes = {"num_frames": 4, "image_size": 160}
    theirs, ours = (create_model("ptv_x3d_m", num_classes=3, **sizes) for _ in range(2))
    load_weights(ours, theirs.state_dict(), fresh=())
    assert all(torch.equal(t, theirs.state_dict()[k]) for k, t in ours.state_dict().items())


# ---- the commands


def run(command, *args):
    try:
        command([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code
    return 0


def settings(folder, demo_root, frames):
    tokens = [1 if frames == 1 else 2, 2, 2]
    path = folder / f"{frames}.yaml"
    path.write_text(f"""
device: cpu
model: {{name: stvit_tiny_patch16_224, patch_size: [{tokens[0]}, 8, 8], embed_dim: 24, depth: 4,
  num_heads: 2, base_depth: 1, semantic_tokens: {tokens}}}
data: {{num_frames: {frames}, stride: 2, image_size: 24, workers: 0,
  train: {demo_root}/train, val: {demo_root}/test}}
train: {{epochs: 1, batch_size: 8}}
eval: {{clips: 1, crops: 1}}
""")
    return ["--cfg", path]


def test_fine_tune_and_score_from_the_command_line(tmp_path, demo_root, capsys):
    images, clips = settings(tmp_path, demo_root, 1), settings(tmp_path, demo_root, 4)
    assert run(cli.train, *images, f"--output={tmp_path}/image") == 0
    fine = [*clips, f"--model.weights={tmp_path}/image/last.pt", f"--output={tmp_path}/video"]
    capsys.readouterr()
    assert run(cli.train, *fine, "--train.epochs=2") == 0
    told = capsys.readouterr().out
    assert "inflated    patch_embed.proj.weight (24, 3, 1, 8, 8) -> (24, 3, 2, 8, 8)" in told
    report = json.loads((tmp_path / "video" / "weights.json").read_text())
    assert len(report["loaded"]) > 40
    # the same classes: the head fits by name, also when scored without --checkpoint
    last = f"{tmp_path}/video/last.pt"
    score = [*clips, f"--output={tmp_path}/score"]
    assert run(cli.test, *score, f"--model.weights={last}") == 0
    by_weights = json.loads((tmp_path / "score" / "report.json").read_text())
    assert run(cli.test, *score, f"--checkpoint={last}") == 0
    by_checkpoint = json.loads((tmp_path / "score" / "report.json").read_text())
    assert by_weights["top1"] == by_checkpoint["top1"]
    # a resumed run starts from its checkpoint, wherever the weights have gone
    assert run(cli.train, *fine[:-2], fine[-1], "--train.epochs=2", "--resume") == 0


def test_what_cannot_be_scored(tmp_path, demo_root, capsys):
    clips = [*settings(tmp_path, demo_root, 4), f"--output={tmp_path}/score"]
    weights, _ = reference("videomae_vit")
    dense = ["--model.semantic_tokens=null", "--model.embed_dim=48", "--model.num_heads=3"]
    dense += ["--data.image_size=32", "--data.num_frames=8", "--model.pos_embed=sincos"]
    path = tmp_path / "headless.safetensors"
    save_file({k: t for k, t in weights.items() if not k.startswith("head")}, path)
    assert run(cli.test, *clips, *dense, f"--model.weights={path}") == 2
    error = capsys.readouterr().err
    assert "missing     head.weight (8, 48)" in error
    assert "can be trained (fresh), but not scored" in error
    assert run(cli.test, *clips) == 2
    assert "give --checkpoint FILE or --model.weights FILE" in capsys.readouterr().err
    for command in (cli.train, cli.test):
        path.write_bytes(path.read_bytes()[:1000])
        assert run(command, *clips, *dense, f"--model.weights={path}") == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "score" / "last.pt").exists()


def test_the_fixed_table_is_videomaes():
    table = sincos_table((4, 4, 4), 48)
    assert isinstance(video(pos_embed="sincos").pos_embed, torch.Tensor)
    assert not isinstance(video(pos_embed="sincos").pos_embed, nn.Parameter)
    assert table[0, 0, 0, 1, 0] == torch.sin(torch.tensor(1.0))
