"""Early exits: by value against Dynamic Token Pruning; who leaves is gone, and what was said stands."""

import pytest
import torch
from safetensors.torch import load_file
from test_superpatches import DECIDERS, half_even, vit, wave

from stvit_video import create_model
from stvit_video.adapters import from_segvit
from stvit_video.models.atm import MaskLogits, atm_losses, resize, spread
from stvit_video.models.exits import EarlyExits, leaving
from stvit_video.models.tokens import Tokens, batch
from stvit_video.weights import load_weights

HEADS = ("linear", "atm")
SMALL = {"dim": 12, "num_heads": 2, "num_layers": 2}
every_head = pytest.mark.parametrize("head", HEADS)


def exits_of(head, threshold=0.9, layers=(2, 4, 5), **how):
    """Exits of a ViT that `vit` makes, confident enough to let many tokens leave."""
    torch.manual_seed(2)
    exits = EarlyExits(24, 3, layers, head=head, threshold=threshold, **SMALL, **how).eval()
    with torch.no_grad():
        for parameter in exits.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.7 if head == "linear" else 0.5)
        if head == "atm":
            for atm in exits.heads.values():
                atm.class_embed.bias.copy_(torch.tensor([3.0, -3.0]))
    return exits


# ---- Dynamic Token Pruning


@pytest.fixture(scope="module")
def dtop():
    """The file's values; the tokens after its first and last layer, and its exits, with its weights."""
    values = load_file("tests/fixtures/dtop_prune_96x96_b2.safetensors")
    weights = {k[2:]: t for k, t in values.items() if k[:2] == "w."}
    sizes = {"num_frames": 1, "image_size": 96, "patch_size": (1, 8, 8), "embed_dim": 24, "depth": 4}
    model = create_model("vit_tiny_patch16_224", num_classes=0, num_heads=2, **sizes).eval()
    report = load_weights(model, weights, fresh=("fc_norm",))
    assert all("head." in name for name in report.dropped if name not in ("cls_token", "pos_embed[:, :1]"))
    exits = EarlyExits(24, 5, [1, 2, 4], head="atm", threshold=0.9, final_factor=True, **SMALL).eval()
    state = from_segvit({k.removeprefix("backbone."): t for k, t in weights.items()})
    for theirs, layer in (("auxiliary_head.0.", 1), ("auxiliary_head.1.", 2), ("decode_head.", 4)):
        head = {k.removeprefix(theirs): t for k, t in state.items() if k.startswith(theirs)}
        exits.heads[str(layer)].load_state_dict(head)
    with torch.no_grad():
        levels, passed = exits(model, wave(2, 3, 96, 96), [1, 4])
    return values, levels, passed


def test_dtop_lets_the_same_tokens_leave(dtop):
    values, levels, passed = dtop
    gone = torch.zeros(2, 144, dtype=torch.bool)
    for i, exit in enumerate(passed):
        said = {k: values[f"out.head_{i}.{k}"] for k in ("confidence", "best_class")}
        masks = {k: values[f"out.head_{i}.{k}"].bool() for k in ("active_before", "leaves", "gone_after")}
        assert exit.active.equal(masks["active_before"])
        if i < 2:
            assert exit.left.equal(masks["leaves"])
            gone |= exit.left
            assert gone.equal(masks["gone_after"])
        scores = MaskLogits(exit.classes, exit.masks).scores()
        confidence, best = scores.max(1)
        assert (confidence - said["confidence"])[exit.active].abs().max() <= 2e-5
        assert best[exit.active].equal(said["best_class"].long()[exit.active])
        assert exit.tokens.equal(exit.active.sum(1))
        of_class = [scores.argmax(1)[n][exit.left[n]].bincount(minlength=5).tolist() for n in range(2)]
        assert exit.leaving.tolist() == of_class
    assert [exit.left.sum(1).tolist() for exit in passed] == [[32, 38], [50, 50], [0, 0]]
    assert passed[0].leaving.tolist() == [[0, 25, 0, 0, 7], [10, 19, 0, 0, 9]]
    assert levels[-1].x.shape == (2, 62, 24)


def test_dtops_outputs_by_value(dtop):
    values, levels, passed = dtop
    for i, exit in enumerate(passed):
        for ours, name in (
            (exit.classes, "class_logits"),
            (exit.masks, "mask_logits"),
            (exit.scores, "prob"),
        ):
            assert (ours - values[f"out.head_{i}.{name}"]).abs().max() <= 2e-5, (i, name)
    tokens, kept = levels[-1], levels[-1].places() >= 0
    for clip, theirs, there in zip(
        tokens.to_grid().flatten(1, 3), values["out.block_3"], kept, strict=True
    ):
        assert (clip[there] - theirs[there]).abs().max() <= 2e-5
        assert not theirs[~there].any()
    scores = resize(passed[-1].scores.unflatten(2, (1, 12, 12)), (1, 96, 96))[:, :, 0]
    assert (scores[..., ::4, ::4] - values["out.head_2.semantic"]).abs().max() <= 2e-5
    assert scores.sum().item() == pytest.approx(60492.908512, abs=0.05)
    assert scores.argmax(1).flatten().bincount().tolist() == [1778, 5235, 2658, 1733, 7028]


def test_dtops_losses_by_value(dtop):
    values, _, passed = dtop
    for i, exit in enumerate(passed):
        losses = atm_losses([MaskLogits(exit.classes, exit.masks)], values["in.label"].long(), (1, 12, 12))
        for name, loss in losses.items():
            expected = values[f"out.head_{i}.loss.{name}"].item()
            assert loss.item() == pytest.approx(expected, abs=2e-5), (i, name)


# ---- who leaves


def test_of_each_class_the_most_confident_stay():
    scores = torch.zeros(1, 2, 8)
    scores[0, 0, :5] = torch.tensor([0.91, 0.99, 0.95, 0.9, 0.97])  # 0.9 does not exceed 0.9
    scores[0, 1, 5:] = torch.tensor([0.92, 0.93, 0.1])
    real = torch.ones(1, 8, dtype=torch.bool)
    for keep, gone in (
        (0, [0, 1, 2, 4, 5, 6]),
        (1, [0, 2, 4, 5]),
        (2, [0, 2]),
        (3, [0]),
        (5, []),
        (50, []),
    ):
        assert leaving(scores, real, 0.9, keep)[0].nonzero()[:, 0].tolist() == gone
    real[0, 1] = False  # padding
    assert leaving(scores, real, 0.9, 1)[0].nonzero()[:, 0].tolist() == [0, 2, 5]
    assert not leaving(torch.ones(1, 2, 8), real, 1.0, 0).any()


@every_head
@pytest.mark.parametrize("sizes", [{}, {"class_token": True}, DECIDERS["contrast"]])
def test_with_threshold_1_it_is_the_plain_model(head, sizes):
    model, clips, exits = vit(**sizes), half_even(3), exits_of(head, threshold=1)
    levels, passed = exits(model, clips, [3, 5])
    for ours, plain in zip(levels, model.levels(clips, [3, 5]), strict=True):
        assert ours.x.equal(plain.x)
        assert ours.to_grid().equal(plain.to_grid())
        assert ours.pooled().equal(plain.pooled())
    assert not any(exit.left.any() for exit in passed)
    last = model.tokens(clips)
    assert passed[-1].masks.equal(spread(exits.heads["5"].of_tokens(last).masks, last))


BUDGET = DECIDERS["dcts"] | {"superpatch_tokens": 20}


@every_head
@pytest.mark.parametrize("sizes", [{}, {"class_token": True}, DECIDERS["contrast"], BUDGET])
def test_who_leaves_is_gone_and_what_was_said_stands(head, sizes):
    model, clips, exits = vit(**sizes), half_even(3), exits_of(head, threshold=0.6, keep=1)
    levels, passed = exits(model, clips, [2, 4, 5])
    first, second, last = passed
    assert all(exit.left.any() for exit in passed[:2])
    assert not last.left.any()
    assert levels[-1].x.shape[1] == last.tokens.max() < first.tokens.max()
    for exit, later in ((first, second), (second, last)):
        assert later.active.equal(exit.active & ~exit.left)
        assert later.tokens.equal(exit.tokens - exit.leaving.sum(1))
        for name in ("masks", "scores"):
            earlier, now = (getattr(e, name).movedim(1, 2) for e in (exit, later))
            assert earlier[~later.active].equal(now[~later.active])
            assert not earlier[later.active].equal(now[later.active])
    for token, gone in zip(model.embed(clips).places(), levels[0].places() < 0, strict=True):
        for i in token.unique():  # superpatches leave with all their patches
            assert len(set(gone[token == i].tolist())) == 1


@every_head
def test_one_image_alone_is_itself_in_a_batch(head):
    model, clips = vit(**DECIDERS["contrast"]), half_even(3)
    exits = exits_of(head, threshold=0.6, keep=1)
    _, together = exits(model, clips)
    for i in range(3):
        _, alone = exits(model, clips[i : i + 1])
        for exit, one in zip(together, alone, strict=True):
            assert exit.left[i].equal(one.left[0])
            assert exit.leaving[i].equal(one.leaving[0])
            assert (exit.scores[i] - one.scores[0]).abs().max() <= 1e-5
            assert (exit.masks[i] - one.masks[0]).abs().max() <= 1e-4


def test_padding_never_leaves_and_is_never_counted():
    exits = exits_of("linear", threshold=0.4, layers=(5,), keep=0)
    clips = [Tokens.of(torch.randn(1, 1, 4, 8, 24)), Tokens.of(torch.randn(1, 1, 4, 8, 24))]
    clips[1] = clips[1].leave(torch.arange(32)[None] < 20)
    exit, gone = exits._exit(5, batch(clips), 0.4, None)
    assert exit.tokens.tolist() == [32, 12]
    assert not gone[1, 12:].any()
    assert gone.any(1).all()
    assert exit.leaving.sum(1).equal(gone.sum(1))


@every_head
def test_gradients_reach_every_exit_and_the_model(head):
    model, clips = vit(**DECIDERS["contrast"]).train(), half_even(3)
    exits = exits_of(head, threshold=0.6, keep=1).train()
    labels = torch.randint(0, 3, (3, 4, 32, 32))
    loss = 0
    for exit in exits(model, clips)[1]:
        if head == "atm":
            loss = loss + sum(
                atm_losses([MaskLogits(exit.classes, exit.masks)], labels, (2, 4, 4)).values()
            )
        else:
            logits = resize(exit.masks.unflatten(2, (2, 4, 4)), (4, 32, 32))
            loss = loss + torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    named = [*model.named_parameters(), *exits.named_parameters()]
    without = {n for n, p in named if p.grad is None or not p.grad.any()}
    others = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert without <= others | {n for n, _ in named if "vectors" in n}


def test_a_final_factor_weighs_anew_what_was_said_before():
    model, clips = vit(), half_even(3)
    (_, stands), (_, weighed) = (
        exits_of("atm", threshold=0.6, keep=1, final_factor=final)(model, clips) for final in (False, True)
    )
    gone = ~weighed[-1].active
    assert weighed[-1].masks.equal(stands[-1].masks)
    torch.testing.assert_close(
        weighed[-1].scores, MaskLogits(weighed[-1].classes, weighed[-1].masks).scores()
    )
    ours, theirs = (exit[-1].scores.movedim(1, 2) for exit in (stands, weighed))
    assert ours[~gone].equal(theirs[~gone])
    assert not ours[gone].allclose(theirs[gone])


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="exit_head='tree'"):
        EarlyExits(24, 5, [1], head="tree")
    with pytest.raises(ValueError, match=r"exits=\[2, 9\]: tokens may leave after each of the layers"):
        exits_of("linear", layers=(2, 9))(vit(), half_even())
    stvit = vit("stvit_tiny_patch16_224", semantic_tokens=(2, 2, 2), base_depth=1)
    with pytest.raises(ValueError, match=r"exits=\[2\]"):
        exits_of("linear", layers=(2,))(stvit, half_even())
    exits_of("linear", layers=(4,), threshold=0.4)(stvit, half_even())


@pytest.mark.parametrize("pool", ["max", "avg", "grid"])
def test_who_left_would_be_back_with_new_tokens_of_the_whole_grid(pool):
    stvit = vit("stvit_tiny_patch16_224", semantic_tokens=(2, 2, 2), base_depth=1, pool=pool)
    pooled = vit("pool_vit_tiny_patch16_224", semantic_tokens=(2, 2, 2), base_depth=1)
    drawn = vit("random_vit_tiny_patch16_224", semantic_tokens=(2, 2, 2), base_depth=1)
    late = vit("stvit_tiny_patch16_224", semantic_tokens=(2, 2, 2), base_depth=3, pool=pool)
    cases = (stvit, "[3, 4, 5]"), (pooled, "[2, 3, 4, 5]"), (drawn, "[2, 3, 4, 5]"), (late, "[5]")
    for model, rest in cases:
        rule = f"^exits=[1, 4]: tokens may leave after each of the layers {rest}$"
        with pytest.raises(ValueError, match=rule.replace("[", r"\[").replace("]", r"\]")):
            exits_of("linear", layers=(1, 4))(model, half_even())


@pytest.mark.parametrize("name", ["stvit_tiny_patch16_224", "tome_vit_tiny_patch16_224"])
def test_who_left_before_tokens_merge_stays_gone(name):
    sizes = {"pool": "merge"} if name.startswith("stvit") else {}
    model = vit(name, semantic_tokens=(2, 2, 2), base_depth=1, **sizes)
    exits = exits_of("linear", layers=(1, 3), threshold=0.6, keep=1)
    (last,), (first, second) = exits(model, half_even())
    assert 0 < first.left.sum() < first.left.numel()
    assert second.active.equal(~first.left)
    assert (last.places() < 0).equal(first.left | second.left)
