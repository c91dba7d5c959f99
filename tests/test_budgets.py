"""Budgets of superpatches while training: which update has which, and that scoring has the model's own."""

import pytest
import torch
from test_end_to_end import assert_same_runs, figures, run, settings, train_in_two
from test_superpatches import DECIDERS, half_even, vit

from stvit_video import cli
from stvit_video.engine import checkpoint
from stvit_video.engine.budgets import Budgets
from stvit_video.errors import InputError
from stvit_video.models.superpatches import Superpatches

DRAWN = (32, 20, 13)


def budgets(budgets=DRAWN, *, seed=0, **more):
    return Budgets(vit(superpatches="contrast", superpatch_tokens=9), budgets, seed=seed, **more)


def test_an_updates_budget_follows_from_seed_and_update_alone():
    one, other = budgets(), budgets(seed=1)
    drawn = [one.at(update) for update in range(300)]
    assert drawn[:8] == [20, 32, 32, 13, 13, 20, 13, 32]
    torch.manual_seed(1)  # whatever else is random
    again = budgets()
    assert [again.at(update) for update in range(299, -1, -1)] == drawn[::-1]
    assert [other.at(update) for update in range(300)] != drawn
    for budget in DRAWN:
        assert 70 <= drawn.count(budget) <= 130
    assert budgets(()).at(0) is None


def test_from_many_tokens_to_few():
    falling = budgets(falling_updates=7)
    assert [falling.at(update) for update in range(9)] == [32, 32, 32, 20, 20, 13, 13, 9, 9]
    assert budgets(falling_updates=0).at(0) == 9
    assert [budgets(falling_updates=2).at(update) for update in range(3)] == [32, 20, 9]


@pytest.mark.parametrize("decider", DECIDERS)
def test_the_model_has_the_budget_for_the_update_only(decider):
    model, clips = vit(**DECIDERS[decider], superpatch_tokens=9), half_even()
    falling, before = Budgets(model, (32, 13), seed=0, falling_updates=2), model(clips)
    for update, tokens in enumerate((32, 13, 9)):
        with falling.during(update):
            assert model.embed(clips).x.shape[1] == tokens
        assert model.embed(clips).x.shape[1] == 9
    with pytest.raises(KeyboardInterrupt), falling.during(0):
        raise KeyboardInterrupt
    assert model(clips).equal(before)


@pytest.mark.parametrize(
    ("sizes", "given", "rule"),
    [
        ({}, {}, r"train.budgets=\[32, 13\]: needs a model with model.superpatches and"),
        ({"superpatches": "contrast"}, {}, r"needs a model with .* model.superpatch_tokens"),
        (
            {"superpatches": "contrast", "superpatch_tokens": 9},
            {"budgets": (13, 3)},
            r"train.budgets=\[13, 3\]: superpatch_tokens=3 must lie between 4 and 32",
        ),
        ({}, {"budgets": (), "falling_updates": 3}, "train.budget_epochs: there are no train.budgets"),
    ],
)
def test_budgets_that_cannot_be(sizes, given, rule):
    with pytest.raises(InputError, match=rule):
        Budgets(vit(**sizes), **{"budgets": (32, 13), "seed": 0} | given)


@pytest.fixture
def args(tmp_path, demo_root):
    merged = ["--model.superpatches=contrast", "--model.superpatch_tokens=8"]
    return [*settings(tmp_path, demo_root), *merged, "--train.budgets=[18,12]"]


def test_a_run_goes_on_with_the_budgets_that_it_would_have_had(args, tmp_path, monkeypatch):
    """Unbroken and resumed to the last bit alike; validated with the model's own."""
    forward, seen = Superpatches.forward, {True: [], False: []}

    def watched(self, *given):
        seen[self.training].append(self.tokens)
        return forward(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Superpatches, "forward", watched)
        assert run(cli.train, *args, f"--output={tmp_path}/unbroken") == 0
    drawn = [entry["tokens"] for entry in figures(tmp_path / "unbroken") if entry["kind"] == "step"]
    assert sorted(set(drawn)) == [12, 18]
    assert seen[True] == [tokens for tokens in drawn for _ in range(2)]  # two batches an update
    assert set(seen[False]) == {8}
    train_in_two(args, tmp_path / "broken", monkeypatch)
    assert_same_runs(tmp_path / "unbroken", tmp_path / "broken")
    assert checkpoint.load(tmp_path / "broken" / "last.pt")["built"]["superpatch_tokens"] == 8


def test_a_run_ends_with_the_models_budget(args, tmp_path):
    assert run(cli.train, *args, "--train.budget_epochs=1.34", f"--output={tmp_path}/run") == 0
    steps = [entry["tokens"] for entry in figures(tmp_path / "run") if entry["kind"] == "step"]
    assert steps == [18, 18, 12, 12, 8, 8]
