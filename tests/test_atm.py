"""SegViT's attention-to-mask head: by value against the official code; and any tokens."""

import pytest
import torch
from safetensors.torch import load_file
from test_tokens import GRID, merged

from stvit_video.adapters import from_segvit
from stvit_video.models.atm import ATMHead, MaskLogits, atm_losses, resize
from stvit_video.models.tokens import Tokens, batch

POSITIONS = {"pos_embed": torch.zeros(1, 1, 1)}  # of the backbone, which is not in this file


@pytest.fixture(scope="module")
def segvit():
    """The file's values, the head with its weights, and the tokens of its three layers."""
    values = load_file("tests/fixtures/atm_segvit_3levels.safetensors")
    head = ATMHead(24, 12, num_heads=2, num_layers=2, num_levels=3, num_classes=5).eval()
    state = from_segvit(POSITIONS | {f"decode_head.{k[2:]}": t for k, t in values.items() if k[:2] == "w."})
    head.load_state_dict({k[12:]: t for k, t in state.items() if k not in POSITIONS})
    levels = [Tokens.of(values[f"in.feat_{i}"].permute(0, 2, 3, 1)[:, None]) for i in range(3)]
    return values, head, levels


def apart(ours, theirs):
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max()


def test_segvit_by_value(segvit):
    values, head, levels = segvit
    *aux, last = head(levels)
    for i, output in enumerate(aux):
        assert apart(output.classes, values[f"out.aux_{i}.pred_logits"]) <= 2e-5
        assert apart(output.masks.unflatten(2, (6, 6)), values[f"out.aux_{i}.pred_masks"]) <= 5e-5
    assert apart(last.classes, values["out.pred_logits"]) <= 2e-5
    masks = resize(last.masks.unflatten(2, (1, 6, 6)), (1, 24, 24))
    assert apart(masks[:, :, 0], values["out.pred_masks"]) <= 5e-5
    scores = MaskLogits(last.classes, masks.flatten(2)).scores()
    assert apart(scores.unflatten(2, (24, 24)), values["out.pred"]) <= 2e-5
    assert scores.sum().item() == pytest.approx(1276.667737, abs=1e-3)
    assert scores.argmax(1)[0].bincount().tolist() == [100, 3, 417, 31, 25]


def test_segvits_losses_by_value(segvit):
    values, head, levels = segvit
    losses = atm_losses(head(levels), values["in.label"].long(), (1, 6, 6))
    expected = {k.removeprefix("out.loss."): t for k, t in values.items() if k.startswith("out.loss.")}
    total = expected.pop("total").item()
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), abs=2e-5), name
    assert sum(losses.values()).item() == pytest.approx(total, abs=5e-5)


def test_losses_of_a_batch_count_masks_over_all_of_it(segvit):
    values, head, levels = segvit
    outputs = [MaskLogits(*(t.repeat(2, 1, 1) for t in output)) for output in head(levels)]
    labels = values["in.label"].long().repeat(2, 1, 1)
    once = atm_losses(head(levels), labels[:1], (1, 6, 6))
    for name, loss in atm_losses(outputs, labels, (1, 6, 6)).items():
        torch.testing.assert_close(loss, once[name])
    halved = atm_losses(outputs, labels, (1, 6, 6), num_masks=12.0)
    torch.testing.assert_close(halved["loss_mask"], once["loss_mask"] / 2)
    torch.testing.assert_close(halved["loss_ce"], once["loss_ce"])
    nothing = atm_losses(outputs, torch.full_like(labels, 255), (1, 6, 6))
    assert nothing["loss_mask"] == nothing["loss_dice"] == 0
    assert all(loss.isfinite() for loss in nothing.values())


@pytest.mark.parametrize("binary", [False, True])
def test_merged_and_padded_tokens_are_their_patches(binary):
    """A token that stands for several patches gives each of them its mask; padding changes nothing."""
    head = ATMHead(24, 12, 2, 2, 2, num_classes=4, binary=binary).eval()
    clips = [[merged(20), merged(7)], [merged(32), merged(12)]]
    together = head([batch([clip[i] for clip in clips]) for i in range(2)])
    for i, clip in enumerate(clips):
        for alone, one in zip(head(clip), together, strict=True):
            torch.testing.assert_close(one.masks[i], alone.masks[0])
            torch.testing.assert_close(one.classes[i], alone.classes[0])
            assert alone.masks.shape == (1, 4, 32)
    masks = head(clips[0])[0].masks
    token = clips[0][1].token[0]
    assert all((masks[..., token == i] == masks[..., token == i][..., :1]).all() for i in range(7))


def test_scores_are_of_0_to_1_and_a_vote_may_go_to_any_class():
    scores = MaskLogits(torch.randn(2, 5, 6) * 9, torch.randn(2, 5, 7) * 9).scores()
    assert scores.shape == (2, 5, 7)
    binary = MaskLogits(torch.tensor([[[9.0, -9.0], [-9.0, 9.0]]]), torch.full((1, 2, 3), 9.0)).scores()
    torch.testing.assert_close(binary, torch.tensor([[[1.0] * 3, [0.0] * 3]]), atol=1e-3, rtol=0)
    votes = torch.full((1, 2, 3), -99.0)
    votes[0, 0, 1] = votes[0, 1, 2] = 99.0  # the first query means the second class, the other none
    assert MaskLogits(votes, torch.full((1, 2, 1), 99.0)).scores().tolist() == [[[0.0], [1.0]]]


def test_autocast_does_not_round_scores():
    masks = MaskLogits(torch.randn(2, 5, 6).bfloat16(), torch.randn(2, 5, 7).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        scores = masks.scores()
    assert scores.dtype == torch.float32
    assert scores.equal(masks.scores())


def test_every_parameter_gets_a_gradient_and_clips_are_taken():
    head = ATMHead(24, 12, 2, 2, 2, num_classes=4)
    levels = [Tokens.of(torch.randn(2, *GRID, 24)) for _ in range(2)]
    labels = torch.randint(0, 4, (2, 4, 32, 32))
    sum(atm_losses(head(levels), labels, GRID).values()).backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="1 levels for an ATM head of num_levels=2"):
        ATMHead(24, 12, 2, 1, 2, 4)([merged(3)])
    with pytest.raises(ValueError, match="dim=12.*num_heads=5"):
        ATMHead(24, 12, 5, 1, 1, 4)
    with pytest.raises(ValueError, match="num_classes=1"):
        ATMHead(24, 12, 2, 1, 1, 1)
