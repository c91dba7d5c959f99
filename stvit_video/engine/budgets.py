"""How many superpatches each update has: one model for many budgets, or from many tokens to few."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..errors import InputError
from ..models.superpatches import Superpatches


class Budgets:
    """`train.budgets` of a model whose superpatches have a budget, `model.superpatch_tokens`.

    One is drawn for each update, by (seed, update) alone: alike on all ranks, and in a resumed run. Or,
    with `falling_updates`, they take turns in the order in which they stand, each in an equal share of so
    many updates from the first on; then the model's holds.
    Raises InputError for a model without such a budget, and for budgets that its grid does not allow.
    """

    def __init__(
        self, model: nn.Module, budgets: Sequence[int], *, seed: int, falling_updates: int | None = None
    ):
        self.budgets, self.seed, self.falling_updates = tuple(budgets), seed, falling_updates
        if not self.budgets:
            if falling_updates is not None:
                raise InputError("train.budget_epochs: there are no train.budgets to train with")
            return
        said = f"train.budgets={list(self.budgets)}"
        self.superpatches = next((m for m in model.modules() if isinstance(m, Superpatches)), None)
        if self.superpatches is None or self.superpatches.tokens is None:
            raise InputError(f"{said}: needs a model with model.superpatches and model.superpatch_tokens")
        for budget in self.budgets:
            try:
                self.superpatches.check_budget(budget)
            except ValueError as error:
                raise InputError(f"{said}: {error}") from None

    def at(self, update: int) -> int | None:
        """How many tokens a clip has in this update, counted from 0; None: there are no `train.budgets`."""
        if not self.budgets:
            return None
        if self.falling_updates is None:
            return random.Random(f"{self.seed} {update}").choice(self.budgets)
        place = update * len(self.budgets) // max(self.falling_updates, 1)
        return self.budgets[place] if update < self.falling_updates else self.superpatches.tokens

    @contextmanager
    def during(self, update: int) -> Iterator[None]:
        """The model with this update's budget; after it, as in scoring, with `model.superpatch_tokens`."""
        budget = self.at(update)
        if budget is None:
            yield
            return
        before, self.superpatches.tokens = self.superpatches.tokens, budget
        try:
            yield
        finally:
            self.superpatches.tokens = before
