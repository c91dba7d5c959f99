"""Where tokens go: how many a model's windows have, and how many leave after which layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..figures import BORDER


class TokenCounts:
    """Of one row of a list: what a model says of the tokens of its windows.

    keep_map: also where in the frame tokens lie and leave, in the first pass: others are of other scales,
        or mirrored.
    """

    def __init__(self, keep_map: bool = False):
        self.keep_map, self.windows = keep_map, []
        self.map: Tensor | None = None

    def add(
        self, outputs: Any, places: Sequence[tuple[int, int]], window: Sequence[int], size: Sequence[int]
    ) -> None:
        """outputs: a `Segmenter`'s; where the tokens are the patches, there is nothing to count.

        places: top left corners of windows of `window` (h, w) pixels in a frame of `size` (H, W).
        """
        if not hasattr(outputs, "exits"):
            return
        for i in range(len(places)):
            counts = [(exit.layer, int(exit.tokens[i]), exit.leaving[i].cpu()) for exit in outputs.exits]
            self.windows.append((outputs.place.shape[1], int(outputs.tokens[i]), counts))
        if not self.keep_map:
            return
        if self.map is None:
            self.map = torch.zeros(*size, dtype=torch.uint8)
        for i, (y, x) in enumerate(places):
            target = self.map[y : y + window[0], x : x + window[1]]
            target[:] = window_map(outputs, i, window)[: target.shape[0], : target.shape[1]]

    def record(self) -> dict[str, Any]:
        """Empty without counts. tokens: of each window, int64; patches: of a window; exits: by layer how
        many tokens were there before it, and how many of each class left, over all windows; map: uint8.
        """
        if not self.windows:
            return {}
        patches, tokens, counts = zip(*self.windows, strict=True)
        exits = {}
        for passed in zip(*counts, strict=True):  # the same exit, of all windows
            layers, before, by_class = zip(*passed, strict=True)
            exits[layers[0]] = sum(before), torch.stack(by_class).sum(0)
        record = {"patches": patches[0], "tokens": torch.tensor(tokens), "exits": exits}
        return record if self.map is None else record | {"map": self.map}


def window_map(outputs: Any, i: int, size: Sequence[int]) -> Tensor:
    """Of window i, an image of `size` (h, w): uint8, 0 where a token stays to the end, 1, 2, ... at which
    exit it left, `BORDER` between tokens."""

    def pixels(values: Tensor) -> Tensor:
        grid = values[i].unflatten(0, outputs.grid)[0].cpu()
        (h, w), (rows, columns) = size, grid.shape
        return grid.repeat_interleave(h // rows, 0).repeat_interleave(w // columns, 1)

    place = pixels(outputs.place)
    out = torch.zeros(place.shape, dtype=torch.uint8)
    for number, exit in enumerate(outputs.exits, 1):
        out[pixels(exit.left)] = number
    for axis in (0, 1):
        before = torch.full_like(place.narrow(axis, 0, 1), -1)
        out[place.diff(dim=axis, prepend=before) != 0] = BORDER
    return out


def summary(
    records: Sequence[Mapping | None], class_names: Sequence[str], items: str = "windows"
) -> dict[str, Any]:
    """-> "tokens": patches of a window, how many windows, and the mean, least and most tokens; "exits": by
    layer the tokens that were there before it, that left there, and these by class, over all windows.

    items: what else is counted in the windows' place. Empty without counts.
    """
    counted = [record["tokens_of"] for record in records if record is not None and record.get("tokens_of")]
    if not counted:
        return {}
    tokens = torch.cat([record["tokens"] for record in counted])
    numbers = {
        "patches": counted[0]["patches"],
        items: len(tokens),
        "mean": int(tokens.sum()) / len(tokens),
        "least": int(tokens.min()),
        "most": int(tokens.max()),
    }
    exits = {}
    for layer in counted[0]["exits"]:
        by_class = sum(record["exits"][layer][1] for record in counted)
        exits[str(layer)] = {
            "tokens": sum(record["exits"][layer][0] for record in counted),
            "left": int(by_class.sum()),
            "classes": dict(zip(class_names, by_class.tolist(), strict=True)),
        }
    return {"tokens": numbers} | ({"exits": exits} if exits else {})


def line(figures: Mapping[str, Any], title: str = "tokens") -> str:
    """What `summary` gave, in words."""
    tokens, exits = figures["tokens"], figures.get("exits", {})
    parts = [
        f"{tokens['mean']:.1f} of {tokens['patches']} patches ({tokens['least']} to {tokens['most']})",
        *(f"{e['left'] / max(e['tokens'], 1):.1%} leave after layer {layer}" for layer, e in exits.items()),
    ]
    return f"  {title:<24} {', '.join(parts)}"
