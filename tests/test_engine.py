import os

import numpy as np
import pytest
import torch
from torch import nn

from stvit_video import create_model
from stvit_video.cli.scoring import _state_of
from stvit_video.config import Config
from stvit_video.data.annotations import Row
from stvit_video.data.transforms import Normalise
from stvit_video.engine import checkpoint
from stvit_video.engine.evaluate import Shares, merge
from stvit_video.engine.optim import make_optimizer, make_schedule, scaled_lr
from stvit_video.errors import InputError
from stvit_video.tasks.classification import Classification, Scores


def tiny():
    return create_model(
        "stvit_tiny_patch16_224", num_classes=3, num_frames=2, image_size=32, depth=4,
        embed_dim=12, num_heads=2, base_depth=1, semantic_tokens=(1, 2, 2),
    )  # fmt: skip


def test_layer_decay_reaches_every_layer():
    model = tiny()
    optimizer = make_optimizer(model, lr=1.0, betas=(0.9, 0.99), weight_decay=0.1, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    scale, decay = {}, {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            scale[names[id(p)]], decay[names[id(p)]] = group["lr_scale"], group["weight_decay"]
    assert scale["patch_embed.proj.weight"] == scale["pos_embed"] == 0.5**5
    assert [scale[f"blocks.{i}.mlp.fc1.weight"] for i in range(4)] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert scale["semantic.centres"] == scale["blocks.2.norm1.weight"]
    assert scale["head.weight"] == scale["fc_norm.weight"] == 1
    undecayed = {n for n, p in model.named_parameters() if p.ndim == 1}
    undecayed |= {"pos_embed", "semantic.centres"}
    assert {name for name, value in decay.items() if value == 0} == undecayed


def test_layer_decay_needs_a_model_that_knows_its_layers():
    with pytest.raises(InputError, match=r"layer_decay=0.75.*group_matcher"):
        make_optimizer(nn.Linear(2, 2), lr=1.0, betas=(0.9, 0.99), weight_decay=0.1, layer_decay=0.75)


def test_schedule_warms_up_and_falls_along_a_cosine():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, updates=110, warmup_updates=10, warmup_lr=0.1, min_lr=0.01)
    rates = [optimizer.param_groups[0]["lr"]]
    for update in range(1, 111):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.505)
    assert rates[110] == pytest.approx(0.01)


def test_learning_rate_follows_the_batch():
    assert scaled_lr(5e-4, 384, 256) == pytest.approx(7.5e-4)


def test_checkpoints_hold_plain_values_and_are_read_without_trust(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"model": tiny().state_dict(), "epoch": 3, "class_names": ["a"]})
    assert checkpoint.load(path)["epoch"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "foreign", "code"])
def test_bad_checkpoints_are_one_line(tmp_path, damage):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"epoch": 3})
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "foreign":
        torch.save({"model": {}}, path)
    else:
        checkpoint.save(path, {"f": print})
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_one_changed_byte_is_noticed_wherever_it_is(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"model": {"weight": torch.arange(10.0)}, "class_names": ["a", "b"]})
    good = path.read_bytes()
    for place in range(0, len(good), 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        with pytest.raises(checkpoint.CheckpointError, match="checksum"):
            checkpoint.load(path)
    path.write_bytes(good)
    assert torch.equal(torch.load(path)["model"]["weight"], torch.arange(10.0))  # torch minds no comment


def scores():
    """Four videos of three classes: right, wrong but second, unreadable, without a label."""
    return Scores(
        scores=np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0, 0, 0], [0.1, 0.2, 0.7]], np.float32),
        labels=np.array([0, 1, 1, -1]),
        views_right=np.array([0.5, 0.25, 0, 0]),
        failures={2: "gone"},
    )


def test_metrics():
    s = scores()
    assert s.predictions.tolist() == [0, 0, -1, 2]
    found = s.figures()
    assert found["top1"] == pytest.approx(1 / 3)
    assert found["top5"] == pytest.approx(2 / 3)  # the unreadable one is wrong even among all
    assert found["mean_class_accuracy"] == pytest.approx(1 / 2)
    assert found["per_clip_top1"] == pytest.approx(1 / 4)
    assert s.top(2).tolist() == [[0, 1], [0, 1], [0, 1], [2, 1]]


def test_without_labels_there_are_no_metrics():
    s = scores()
    s.labels[:] = -1
    assert set(s.figures().values()) == {None}


def test_ties_go_to_the_lower_class():
    s = Scores(np.full((1, 4), 0.25, np.float32), np.array([3]), np.zeros(1), {})
    assert s.predictions.tolist() == [0]
    assert s.top(3).tolist() == [[0, 1, 2]]


def test_a_video_scored_twice_or_never_is_an_error():
    rows = [Row("a", 0), Row("b", 1)]
    outcome = merge([({0: "first"}, {}), ({}, {1: "gone"})], rows)
    assert (outcome.records, outcome.failures) == (["first", None], {1: "gone"})
    for shares in ([({0: 1}, {}), ({0: 1}, {})], [({0: 1}, {})]):
        with pytest.raises(RuntimeError, match="2 videos, but"):
            merge(shares, rows)


@pytest.mark.parametrize("view_batch", [1, 4, 100])
def test_scores_do_not_depend_on_the_view_batch(view_batch):
    model, normalise = tiny().eval(), Normalise((0.5,) * 3, (0.2,) * 3)
    clips = torch.randint(256, (2, 3, 3, 2, 32, 32), dtype=torch.uint8)
    expected = model(normalise(clips.flatten(0, 1))).softmax(-1).view(2, 3, 3)
    task = Classification("abc", normalise=normalise, view_batch=view_batch)
    torch.testing.assert_close(task.view_scores(model, clips), expected)


def test_shares_of_another_scoring_are_not_taken_up(tmp_path):
    shares = Shares(tmp_path / "shares", ["best.pt", 3])
    shares.write({0: {"scores": torch.zeros(2)}})  # it is not time
    assert not (tmp_path / "shares").exists()
    shares.write({0: {"scores": torch.ones(2)}}, now=True)
    (tmp_path / "shares" / "share-9-of-9-0.pt").write_bytes(b"cut off")
    records = Shares(tmp_path / "shares", ["best.pt", 3]).read()
    assert records.keys() == {0}
    assert torch.equal(records[0]["scores"], torch.ones(2))
    assert Shares(tmp_path / "shares", ["best.pt", 4]).read() == {}
    shares.discard()
    assert not (tmp_path / "shares").exists()


@pytest.mark.parametrize(
    "group_and_key", [None, ("model", "policy"), ("train", "teacher"), ("eval", "proposals")]
)
def test_shares_know_the_files_that_were_read_by_their_contents(tmp_path, group_and_key):
    config, file = Config(), tmp_path / "read"
    if group_and_key:
        setattr(getattr(config, group_and_key[0]), group_and_key[1], str(file))
    states, source = [], "hf:them/vit" if group_and_key else str(file)
    for content in (None, "a", "b", "bb"):
        if content:
            file.write_text(content)
            os.utime(file, ns=(0, len(states)))
        states.append(_state_of(config, source))
    assert states[0] == [None] * 4
    assert len({str(state) for state in states}) == 4


def test_a_share_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "shares").write_text("in the way")
    Shares(tmp_path / "shares", []).write({0: 1}, now=True)
    assert "warning: what was scored so far is not kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "rates"),
    [("poly", {10: 1.0, 60: 0.01 + 0.99 * 0.5**0.9, 110: 0.01}), ("steps", {39: 1.0, 40: 0.1, 80: 0.01})],
)
def test_other_schedules(kind, rates):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    options = {"updates": 110, "warmup_updates": 10, "warmup_lr": 0.1, "min_lr": 0.01}
    schedule = make_schedule(optimizer, **options, kind=kind, steps=(40, 80))
    for update in range(1, 111):
        schedule.step_update(update)
        if update in rates:
            assert optimizer.param_groups[0]["lr"] == pytest.approx(rates[update])


def test_a_head_has_a_rate_of_its_own_beside_layer_decay():
    model = tiny()
    options = {"lr": 1.0, "betas": (0.9, 0.99), "weight_decay": 0.1, "layer_decay": 0.5}
    plain, faster = (make_optimizer(model, **options, head_lr=factor) for factor in (1.0, 10.0))
    names = {id(p): name for name, p in model.named_parameters()}
    scales = [
        {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in (plain, faster)
    ]
    assert scales[0].keys() == scales[1].keys() == set(names.values())
    changed = {name: scales[1][name] / scale for name, scale in scales[0].items()}
    assert changed == {name: 10.0 if name.startswith("head.") else 1.0 for name in changed}
