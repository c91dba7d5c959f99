"""STEP joined to segmentation: heads, exits, counts of tokens, and the policy that is trained for it."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launch import finish, launch
from safetensors.torch import load_file
from test_end_to_end import assert_same_runs, figures, run, train_in_two
from test_segmentation import NORMALISE, SMALL, batch_of, scenes, task  # noqa: F401
from test_superpatches import NET, half_even, wave

from stvit_video import build, cli, create_model
from stvit_video.bench.step import bench_checkpoints, bench_step, fix_choice, fix_threshold
from stvit_video.config import Config, ModelConfig, make_parser, parse, resolve, to_dict
from stvit_video.data.batch import Batch
from stvit_video.data.mask_views import Truth
from stvit_video.engine import checkpoint
from stvit_video.engine.freeze import train_mode
from stvit_video.errors import InputError
from stvit_video.files import read_torch, write_torch
from stvit_video.models.tokens import Tokens
from stvit_video.recognizer import load_model
from stvit_video.resume import check_resume
from stvit_video.tasks.policy import Policy
from stvit_video.tasks.segmentation import Segmentation
from stvit_video.tasks.token_counts import TokenCounts, window_map
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


@pytest.mark.parametrize(
    "sizes", [*({"exits": [2, 3], "exit_threshold": 0.5} | h for h in HEADS.values()), DTOP, ATM]
)
def test_one_image_alone_is_itself_in_a_batch(sizes):
    """Of images with different numbers of tokens."""
    model, clips, size = segmenter(**CONTRAST, **sizes), images(), (1, 32, 32)
    together = model(clips)
    assert len(together.tokens.unique()) > 1
    scores = model.scores(together, size)
    for i in range(len(clips)):
        alone = model(clips[i : i + 1])
        assert (model.scores(alone, size)[0] - scores[i]).abs().max() <= 1e-5
        for one, exit in zip(alone.exits, together.exits, strict=True):
            assert torch.equal(one.left[0], exit.left[i])
            assert torch.equal(one.leaving[0], exit.leaving[i])


@pytest.mark.parametrize(
    "sizes", [*({"exits": [2, 3], "exit_threshold": 0.5} | h for h in HEADS.values()), DTOP, ATM, LINEAR]
)
def test_gradients_reach_what_should_have_them(sizes):
    model = segmenter(superpatches="dcts", superpatch_policy=NET, **sizes).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    clips = torch.randint(0, 256, (2, 1, 3, 1, 32, 32), dtype=torch.uint8)
    batch = batch_of(clips, torch.randint(0, 3, (2, 1, 1, 32, 32), dtype=torch.uint8))
    losses = task(3).loss(model, batch)
    losses["loss"].backward()
    assert sum(name.startswith("exit_") for name in losses) == len(sizes.get("exits", ())) - (
        "exits" in sizes and sizes["exits"][-1] == 4
    )
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {n for n in frozen if "superpatches.policy." in n}
    idle = ("k.bias", "proj.bias", "in_proj_bias")  # attention's key bias changes nothing
    assert {n for n in without if not n.endswith(idle) and "superpatches.vectors" not in n} <= frozen
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    again = create_model(**model.built)
    again.load_state_dict(model.state_dict())


def test_dynamic_token_pruning_by_value():
    """A segmenter takes its checkpoint, and predicts what it does."""
    values = load_file("tests/fixtures/dtop_prune_96x96_b2.safetensors")
    weights = {k[2:]: t for k, t in values.items() if k[:2] == "w."}
    sizes = VIT | DTOP | {"num_classes": 5, "image_size": 96, "head_layers": 2, "exit_threshold": 0.9}
    model = create_model("vit_tiny_patch16_224", **sizes).eval()
    report = load_weights(model, weights, fresh=())
    assert not report.missing
    with torch.no_grad():
        outputs = model(wave(2, 3, 96, 96))
        scores = model.scores(outputs, (1, 96, 96))[:, :, 0]
    assert [exit.left.sum(1).tolist() for exit in outputs.exits] == [[32, 38], [50, 50], [0, 0]]
    assert (scores[..., ::4, ::4] - values["out.head_2.semantic"]).abs().max() <= 2e-5
    losses = model.loss(outputs, values["in.label"][:, None])
    expected = [
        sum(values[f"out.head_{i}.loss.{k}"].item() for k in ("loss_ce", "loss_mask", "loss_dice"))
        for i in range(3)
    ]
    assert [losses["exit_1"].item(), losses["exit_2"].item()] == pytest.approx(expected[:2], abs=5e-5)
    assert losses["loss"].item() == pytest.approx(sum(expected), abs=1e-4)


def test_segvits_checkpoint_by_value():
    """Its head, with its names, beside a ViT's backbone."""
    values = load_file("tests/fixtures/atm_segvit_3levels.safetensors")
    theirs = load_file("tests/fixtures/dtop_prune_96x96_b2.safetensors")
    weights = {k[2:]: t for k, t in theirs.items() if k.startswith("w.backbone.")}
    weights |= {f"decode_head.{k[2:]}": t for k, t in values.items() if k[:2] == "w."}
    sizes = VIT | ATM | {"num_classes": 5, "image_size": 96, "head_layers": 2, "head_levels": [2, 3, 4]}
    model = create_model("vit_tiny_patch16_224", **sizes).eval()
    load_weights(model, weights, fresh=())
    levels = [values[f"in.feat_{i}"].permute(0, 2, 3, 1)[:, None] for i in range(3)]
    logits = model.decode([Tokens.of(level) for level in levels], [], None)
    scores = model.scores(logits, (1, 24, 24))[:, :, 0]
    assert (scores - values["out.pred"]).abs().max() <= 2e-5
    losses = model.loss(logits, values["in.label"][:, None])
    assert losses["loss"].item() == pytest.approx(89.773399, abs=1e-4)
    model = create_model("vit_tiny_patch16_224", **sizes | {"exits": [2]})
    with pytest.raises(WeightsError, match=r"head.exits.heads.2"):
        load_weights(model, weights, fresh=())
    assert "head.q.weight" in load_weights(model, weights).loaded


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        (
            LINEAR | {"exits": [2, 4]},
            r"exits=\[2, 4\]: tokens may leave after each of the layers \[1, 2, 3\]",
        ),
        (ATM | {"exits": [5], "exit_head": "atm"}, r"exits=\[5\]: tokens may leave"),
        (ATM | {"head_levels": [2, 3]}, r"head_levels=\[2, 3\]: must be among the layers .* with the last"),
        (ATM | {"head_levels": []}, r"head_levels=\[\]: must be among the layers .* with the last"),
        (ATM | {"exits": [1], "exit_head": "tree"}, "exit_head=tree: must be one of"),
        (ATM | {"exit_head": "linear"}, "exit_head=linear: without exits no token leaves"),
        (ATM | {"head_dim": 13}, "dim=13 of an ATM head does not divide into num_heads=2"),
    ],
)
def test_sizes_that_do_not_fit(sizes, rule):
    with pytest.raises(ValueError, match=rule):
        segmenter(**sizes)


@pytest.mark.parametrize(
    ("flag", "rule"),
    [
        ("exits=[2]", r"exits=\[2\]: tokens may leave after each of the layers"),
        ("exit_threshold=0.5", "exit_threshold=0.5: without exits no token leaves"),
        ("base_depth=12", "base_depth=12 and semantic_layers=2, of a reducer, must fit into depth=12"),
        ("patch_size=[1,48,48]", "48"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_a_demo_set_is_rendered(tmp_path, flag, rule):
    args = ["--task=segmentation", "--model.name=stvit_tiny_patch16_224", f"--model.{flag}"]
    args += ["--data.preset=demo", f"--data.train={tmp_path}/demo_scenes/train.txt"]
    config = resolve(parse(make_parser(""), [*args, "--data.num_frames=1", "--data.image_size=64"])[0])
    with pytest.raises(build.ConfigError, match=rule):
        build.build_job(config, torch.device("cpu"))
    assert not list(tmp_path.iterdir())


def test_atm_on_windows_has_one_level():
    swin = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "image_size": 64}
    swin |= {"num_classes": 3, "num_frames": 1} | ATM
    with pytest.raises(ValueError, match=r"head_levels=2: VideoSwin has one for this head"):
        create_model("swin_tiny_patch4_window7_224", **swin)
    with pytest.raises(ValueError, match=r"exits=\[1\]: tokens leave a ViT only"):
        create_model("swin_tiny_patch4_window7_224", **swin | {"head_levels": 1, "exits": [1]})
    model = create_model("swin_tiny_patch4_window7_224", **swin | {"head_levels": 1}).eval()
    outputs = model(torch.randn(2, 3, 50, 70))
    assert model.scores(outputs, (1, 50, 70)).shape == (2, 3, 1, 50, 70)
    targets = torch.randint(0, 3, (2, 1, 50, 70))
    padded = torch.nn.functional.pad(targets, [0, 26, 0, 14], value=255)
    losses = (model.loss(outputs, masks)["loss"] for masks in (targets, padded))
    assert torch.equal(*losses), "masks lie where the patches are, of which the last ones stick out"


def test_counts_of_windows_are_those_of_their_tokens(tmp_path):
    """Counted by a walk over the patches; and a scoring that is broken off keeps them."""
    model = segmenter(**LINEAR, **CONTRAST, exits=[2, 3], exit_threshold=0.5)
    outputs, counts = model(images(2)), TokenCounts(keep_map=True)
    counts.add(outputs, [(0, 0), (0, 16)], (32, 32), (32, 40))
    counts.add(model(images(1)).logits, [(0, 0)], (32, 32), (32, 40))  # plain logits: nothing
    write_torch(tmp_path / "share.pt", counts.record())
    record = read_torch(tmp_path / "share.pt")
    places, first, last = outputs.place.tolist(), *(exit.left.tolist() for exit in outputs.exits)
    assert record["tokens"].tolist() == [len(set(place)) for place in places]
    left = [
        sum(
            len({t for t, gone in zip(*pair, strict=True) if gone}) for pair in zip(places, at, strict=True)
        )
        for at in (first, last)
    ]
    there = int(record["tokens"].sum())
    assert {n: (before, int(by_class.sum())) for n, (before, by_class) in record["exits"].items()} == {
        2: (there, left[0]),
        3: (there - left[0], left[1]),
    }
    assert 0 < left[0] < there
    for i, (at, corner) in enumerate([(0, 0), (1, 16)]):
        for patch in range(16) if i else [0, 1, 4, 5, 8, 9, 12, 13]:  # the second window is above the first
            y, x = 8 * (patch // 4) + 4, corner + 8 * (patch % 4) + 4
            if x < 40:
                assert record["map"][y, x] == first[at][patch] + 2 * last[at][patch]


def test_tokens_are_those_of_the_first_layer_whatever_merges_them_later():
    merging = {"base_depth": 2, "semantic_tokens": (1, 2, 2), "exits": [4], **LINEAR}
    model = create_model("tome_vit_tiny_patch16_224", **VIT | {"depth": 6} | merging).eval()
    passed = model(images())
    assert passed.tokens.tolist() == [16] * 3
    assert (passed.place == torch.arange(16)).all()
    assert passed.exits[0].tokens.tolist() == [4] * 3, "at the exit they are merged"


def test_the_map_of_an_image_smaller_than_a_window_is_the_images():
    model, image = (
        segmenter(**LINEAR, **CONTRAST),
        (255 * half_even(1)[0, :, :1, :20, :24].clamp(0, 1)).byte(),
    )
    scorer, counts = Segmentation("abc", normalise=NORMALISE), TokenCounts(keep_map=True)
    scorer.predict(model, image, (1, 20, 24), counts)
    padded = torch.nn.functional.pad(NORMALISE(image), (0, 8, 0, 12))
    assert counts.map.equal(window_map(model(padded[None]), 0, (32, 32))[:20, :24])
    assert counts.map.any()


JOINED = VIT | {"num_frames": 4, "base_window": 2, "base_depth": 1, "semantic_tokens": (2, 2, 2)}
JOINED |= {"superpatch_shapes": [(2, 2, 2), (1, 2, 2)]}


def test_tokens_of_chunks_are_those_of_each():
    torch.manual_seed(0)
    model = create_model("stvit_tiny_patch16_224", **JOINED, **LINEAR, **CONTRAST).eval()
    clip = half_even(2)
    passed = model(clip)
    for chunk, frames in enumerate((slice(0, 2), slice(2, 4))):
        tokens = model.backbone.embed(clip[:, :, frames])
        place = passed.place[:, 32 * chunk : 32 * chunk + 32]
        assert (place - 32 * chunk).equal(tokens.places())
    assert passed.place.shape == (2, 64)
    assert passed.tokens.tolist() == [len(set(place)) for place in passed.place.tolist()]
    assert passed.tokens[0] < 64


def test_the_policy_of_chunks_learns_from_the_masks_of_each():
    sizes = JOINED | {"superpatches": "dcts", "superpatch_policy": NET, "head": "policy"}
    model = create_model("stvit_tiny_patch16_224", **sizes)
    masks = torch.randint(0, 2, (2, 4, 4, 4)).repeat_interleave(8, 2).repeat_interleave(8, 3)
    each = [
        model.targets(masks[i : i + 1, part], False) for i in (0, 1) for part in (slice(2), slice(2, 4))
    ]
    targets = model.targets(masks, False)
    for target, parts in zip(targets, zip(*each, strict=True), strict=True):
        assert target.equal(torch.cat(parts))
    learner = Policy("ab", normalise=NORMALISE)
    clips = torch.randint(0, 256, (1, 2, 3, 4, 32, 32), dtype=torch.uint8)
    assert learner.loss(model, Batch(torch.arange(1), clips, masks[None]))["loss"].isfinite()
    truths = [Truth(mask.byte(), [0, 1, 2, 3]) for mask in masks]
    record = learner._record(model.eval(), clips[0], truths, None)
    assert record["counts"][:, 3].tolist() == [16, 32]  # groups of four chunks
    assert len(record["tokens_of"]["tokens"]) == 4
    assert record["tokens_of"]["patches"] == 32


# ---- runs

STEP = [
    "--data.image_size=64",
    "--data.short_side=64",
    "--model.superpatches=contrast",
    "--model.depth=3",
    "--model.exits=[1,2]",
    "--model.exit_threshold=0.14",
]
SMALL_ATM = ["atm", "--model.head_dim=12", "--model.head_heads=2", "--model.head_layers=1"]


@pytest.fixture(scope="module")
def args(scenes, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("step") / "small.yaml"
    path.write_text(SMALL)
    return ["--cfg", str(path), f"--data.train={scenes}/train.txt", f"--data.val={scenes}/test.txt"]


def scored(folder):
    return json.loads((folder / "report.json").read_text()) | {"seconds": 0}


@pytest.mark.parametrize(("head", "ranks"), [(["linear"], 1), (SMALL_ATM, 2)], ids=["linear", "atm"])
def test_tokens_are_counted_exactly_on_any_number_of_ranks(args, head, ranks, tmp_path):
    log = tmp_path / "log.txt"

    def start(command, ranks, *given):
        assert finish(launch(command, *args, *given, ranks=ranks, log=log)) == [0] * ranks, log.read_text()

    chosen = [*STEP, f"--model.head={head[0]}", *head[1:]]
    start(cli.train, ranks, *chosen, f"--output={tmp_path}/run")
    losses = [entry for entry in figures(tmp_path / "run") if "exit_1" in entry]
    assert losses[0]["exit_1"] > 0 < losses[0]["exit_2"]
    checkpoint = f"--checkpoint={tmp_path}/run/last.pt"
    assert run(cli.test, *args, checkpoint, f"--output={tmp_path}/1", "--eval.dump_views=true") == 0
    for count in (2, 3)[: 3 - ranks]:
        start(cli.test, count, checkpoint, f"--output={tmp_path}/{count}")
        assert scored(tmp_path / "1") == scored(tmp_path / str(count))
    report = scored(tmp_path / "1")
    tokens, exits = report["tokens"], report["exits"]
    assert tokens["patches"] == 64
    assert tokens["least"] < tokens["most"] <= 64
    assert list(exits) == ["1", "2"]
    assert exits["1"]["tokens"] == pytest.approx(tokens["mean"] * tokens["windows"])
    assert exits["2"]["tokens"] == exits["1"]["tokens"] - exits["1"]["left"] < exits["1"]["tokens"]
    for exit in exits.values():
        assert sum(exit["classes"].values()) == exit["left"]
    assert (tmp_path / "1" / "tokens.png").stat().st_size > 10_000
    assert len(list((tmp_path / "1" / "masks").glob("*_tokens.png"))) == 5


# ---- the policy

POLICY = ["--model.superpatches=dcts", f"--model.superpatch_policy={NET}"]


@pytest.fixture(scope="module")
def policy(args, tmp_path_factory):
    """A run of task=policy, on two ranks."""
    folder = tmp_path_factory.mktemp("policy")
    log = folder / "log.txt"
    given = [*args, *POLICY, "--task=policy", f"--output={folder}/run", "--train.ema=null"]
    assert finish(launch(cli.train, *given, ranks=2, log=log)) == [0, 0], log.read_text()
    return folder / "run"


def test_the_policy_is_scored_exactly_on_any_number_of_ranks(args, policy, tmp_path):
    given = [*args, f"--checkpoint={policy}/last.pt"]
    assert run(cli.test, *given, f"--output={tmp_path}/1") == 0
    started = launch(cli.test, *given, f"--output={tmp_path}/2", ranks=2, log=tmp_path / "log.txt")
    assert finish(started) == [0, 0], (tmp_path / "log.txt").read_text()
    report = scored(tmp_path / "1")
    assert report == scored(tmp_path / "2")
    assert list(report["groups"]) == ["4x4", "2x2"]
    assert report["groups"]["4x4"]["share"] < report["groups"]["2x2"]["share"]
    assert (tmp_path / "1" / "tokens.png").stat().st_size > 10_000
    _, _, model = load_model(policy / "last.pt")
    start = build.build_model(load_model(policy / "last.pt")[0], 8)
    assert not torch.equal(
        model.superpatches.policy.heads[0].weight, start.superpatches.policy.heads[0].weight
    )
    assert set(model.state_dict()) == {n for n in model.state_dict() if n.startswith("superpatches.")}


@pytest.mark.parametrize(
    ("flag", "rule"),
    [("zooms=[1.0,1.5]", "eval.zooms=(1.0, 1.5)"), ("mirrored=true", "eval.mirrored=True")],
)
def test_scoring_that_the_policy_has_not_is_refused(args, policy, tmp_path, capsys, flag, rule):
    """In training, and where only the checkpoint says what task it is of."""
    given = [*args, f"--eval.{flag}", f"--output={tmp_path}/run"]
    assert run(cli.train, *given, *POLICY, "--task=policy") == 2
    assert run(cli.test, *given, f"--checkpoint={policy}/last.pt") == 2
    assert capsys.readouterr().err == f"error: {rule}: task=policy is scored without it\n" * 2


def test_a_segmenter_takes_the_policy_and_leaves_it_alone(args, policy, tmp_path, monkeypatch, capsys):
    """Resumed in the middle of its epochs, it ends as if unbroken."""
    given = [*args, *POLICY, f"--model.policy={policy}/last.pt", "--model.exits=[1]"]
    assert run(cli.train, *given, f"--output={tmp_path}/unbroken") == 0
    proposed = capsys.readouterr().out
    assert f"recognise:   stvit-predict --checkpoint {tmp_path}/unbroken/best.pt IMAGE..." in proposed
    assert "stvit-page" not in proposed  # which shows classes of videos alone
    train_in_two(given, tmp_path / "broken", monkeypatch)
    assert_same_runs(tmp_path / "unbroken", tmp_path / "broken")
    state_of_run = checkpoint.load(tmp_path / "broken" / "last.pt")
    theirs = load_model(policy / "last.pt")[2].superpatches.policy.state_dict()
    for kind in ("model", "ema"):
        state = state_of_run[kind]
        for name, tensor in theirs.items():
            assert torch.equal(state[f"backbone.superpatches.policy.{name}"], tensor), name


def test_a_run_goes_on_where_its_policy_has_moved():
    """It is not read again."""
    run = {"seed": 0, "videos": 4, "list": "", "ranks": 1}
    job = SimpleNamespace(details={"run": run, "class_names": ["a"]}, train_loader=range(4))
    first, moved = (Config(model=ModelConfig(policy=path)) for path in ("there.pt", "elsewhere.pt"))
    state = {"config": to_dict(first), "run": run, "class_names": ["a"], "schedule": {}}
    check_resume(state, moved, job, "last.pt")


def test_a_policy_that_does_not_fit(args, policy, tmp_path, capsys):
    take = f"--model.policy={policy}/last.pt"
    for given, rule in (
        (POLICY, "without model.policy (what --task policy trains) or model.weights chance would decide"),
        ([take], "the model has no superpatches=dcts"),
        (
            [*POLICY, take, "--model.patch_size=[1,16,16]"],
            "decides by patch_size=(1, 8, 8), not (1, 16, 16)",
        ),
        (
            [*POLICY[:1], take, "--model.superpatch_policy=lcnet_050"],
            "another network than model.superpatch_policy",
        ),
        ([*POLICY, take, "--data.mean=[0.5,0.5,0.5]"], "was trained with data.mean="),
    ):
        assert run(cli.train, *args, *given, f"--output={tmp_path}/run") == 2
        assert rule in capsys.readouterr().err
    with pytest.raises(ValueError, match="head=policy: the network of model.superpatches=dcts"):
        segmenter(head="policy")


def test_cts_begins_with_an_imagenet_network():
    import timm

    model = segmenter(head="policy", superpatches="dcts", superpatch_policy=NET)
    weights = timm.create_model(NET, num_classes=7).state_dict()
    report = load_weights(model, weights, fresh=("heads", "vectors"))
    assert report.origin == "timm EfficientNet"
    stem = model.superpatches.policy.backbone.conv_stem.weight
    assert torch.equal(stem, weights["conv_stem.weight"])


@pytest.mark.parametrize(("shapes", "deepest"), [([(1, 4, 4), (1, 2, 2)], 32), ([(1, 2, 2)], 16)])
def test_the_policy_learns_as_deep_as_its_groups_read_it(shapes, deepest):
    """A parameter without a gradient among those that learn stops a run on several processes."""
    sizes = {"superpatches": "dcts", "superpatch_policy": NET, "superpatch_shapes": shapes}
    model = segmenter(head="policy", **sizes).train()
    policy = model.superpatches.policy
    assert max(policy.strides[level] for level in policy.levels) == deepest
    model.loss(model(images(3)), model.targets(torch.zeros(3, 1, 32, 32), False))["loss"].backward()
    learns = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == learns
    assert ("backbone.blocks.4.0.conv_pw.weight" in learns) == (deepest == 32)
    assert {name for name, _ in policy.heads.named_parameters(prefix="heads")} <= learns


def test_batch_norms_of_the_policy_need_more_than_one_value():
    sizes = {"superpatches": "dcts", "superpatch_policy": NET}
    coarse, fine = (
        segmenter(head="policy", **sizes, superpatch_shapes=[shape]) for shape in ((1, 4, 4), (1, 2, 2))
    )
    with pytest.raises(InputError, match="a batch of 1 image of 32x32 pixels has one value a channel"):
        coarse.train()(images(1))
    train_mode(fine)
    assert fine(images(1))[0].shape == (1, 2, 1, 2, 2)
    assert coarse(images(2))[0].shape == coarse.eval()(images(2))[0].shape == (2, 2, 1, 1, 1)


def test_figures_of_the_policy_are_those_of_a_walk_over_all_groups():
    from stvit_video.data.masks import IGNORED
    from stvit_video.tasks.policy import count_groups, rates

    said = torch.tensor([True, True, False, False, True, False])
    true = torch.tensor([1, 0, 1, 0, IGNORED, IGNORED])
    counts = count_groups(said, true)
    assert counts.tolist() == [1, 2, 2, 4]
    assert rates(counts.tolist()) == {
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "share": 0.5,
        "said": 0.5,
    }
    assert rates([0, 0, 3, 9])["precision"] == 1
    assert rates([0, 0, 3, 9])["f1"] == 0


# ---- the benchmark


def test_the_benchmark_merges_and_lets_leave_as_much_as_it_says():
    sizes = VIT | {"superpatches": "dcts", "superpatch_policy": NET, "image_size": 64, "exits": [2]}
    model = create_model("vit_tiny_patch16_224", **sizes | LINEAR).eval()
    image = torch.randn(1, 3, 1, 64, 64)
    fix_choice(model.backbone.superpatches, 2.5)
    with torch.no_grad():
        fix_threshold(model, model.exits, image, 0.4)
        outputs = model(image)
    assert outputs.tokens.tolist() == [26]
    assert outputs.exits[0].leaving.sum().item() == pytest.approx(0.4 * 26, abs=1)
    small = {"patch_size": (1, 8, 8), "embed_dim": 24, "depth": 4, "num_heads": 2, "superpatch_policy": NET}
    options = {"share": 2.5, "leave": 0.4, "rounds": 1, "device": torch.device("cpu")}
    plain, merged, *early = bench_step(
        "vit_tiny_patch16_224", image_size=64, head="atm", **options, **small, head_dim=12, head_heads=2
    )
    assert plain["ratio"] == plain["fewer"] == 1
    assert [row["model"] for row in early] == ["dCTS, linear exit", "dCTS, ATM exit"]
    assert merged["G multiply-adds"] > early[0]["G multiply-adds"]
    assert all(row["images/s"] > 0 for row in early)


def test_checkpoints_are_timed_as_they_are_scored(args, scenes, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(scenes, tmp_path / "set")
    given = [*args, "--train.precision=bf16", f"--data.test={tmp_path}/set/test.txt"]
    config = resolve(parse(make_parser(""), given)[0])
    rows, names = build.read_split(config, "test")
    model = build.build_model(config, len(names))
    values = {"config": to_dict(config), "class_names": names, "built": model.built, "ema": None}
    checkpoint.save(tmp_path / "last.pt", values | {"model": model.state_dict()})
    records, precise = Segmentation.records, []

    def watched(*arguments):
        precise.append(not torch.is_autocast_enabled("cpu"))
        return records(*arguments)

    monkeypatch.setattr(Segmentation, "records", watched)
    case = {"limit": 2, "rounds": 1, "device": torch.device("cpu")}
    (row,) = bench_checkpoints([f"{tmp_path}/last.pt"], **case)
    assert row["images/s"] > 0
    assert precise == [False] * 4  # two batches scored; one counted and timed
    Path(rows[1].path).write_bytes(b"no image")
    with pytest.raises(InputError, match="^.*test_0001.*: to compare models, all must be readable$"):
        bench_checkpoints([f"{tmp_path}/last.pt"], **case)


def test_a_checkpoint_is_timed_with_other_sizes(args, scenes, tmp_path, capsys):  # noqa: F811
    config = resolve(parse(make_parser(""), [*args, *STEP, f"--data.test={scenes}/test.txt"])[0])
    names = build.read_split(config, "test")[1]
    model, path = build.build_model(config, len(names)), tmp_path / "last.pt"
    values = {"config": to_dict(config), "class_names": names, "built": model.built, "ema": None}
    checkpoint.save(path, values | {"model": model.state_dict()})
    case = ["--limit=2", "--rounds=1", "--device=cpu", f"--output={tmp_path}/bench"]
    sizes = [str(path), f"{path}:superpatch_threshold=0:exit_threshold=1", f"{path}:superpatch_tokens=25"]
    cli.bench(["step", "--checkpoints", *sizes, *case])
    with open(tmp_path / "bench" / "step.csv", newline="") as file:
        by_default, plain, budget = csv.DictReader(file)
    assert [row["model"] for row in (by_default, plain, budget)] == sizes
    assert float(plain["tokens"]) == float(plain["patches"]) == 64
    assert float(budget["tokens"]) == 25
    assert float(plain["G multiply-adds"]) > float(by_default["G multiply-adds"])
    assert (tmp_path / "bench" / "step.png").stat().st_size > 10_000
    for sizes, rule in (("exits=[7]", "exits"), ("depth=4", "blocks.3"), ("deep=2", "deep")):
        with pytest.raises(SystemExit):
            cli.bench(["step", "--checkpoints", f"{path}:{sizes}", *case])
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith(f"error: --checkpoints {path}:{sizes}: ")
        assert rule in line
