"""Superpatches: groups of patches that are one token from the first layer on.

"Content-aware Token Sharing for Efficient Semantic Segmentation" (CTS, CVPR 2023) shares a token among 2x2
patches; "Where Do Tokens Go?" (STEP, 2025) among up to 16x16, as many as an image needs; groups over time,
and groups chosen by contrast alone, are this project's extension.

A group's pixels are averaged to those of one patch, which the ordinary patch embedding projects; it gets
the mean of its patches' positions and a learned vector of its shape. What decides sees the very pixels that
are embedded: normalised, mixed, erased.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from .embed import PatchEmbed, Size3, split_tubelets
from .tokens import Tokens, highest_first, select

IMAGE_SHAPES = ((1, 16, 16), (1, 8, 8), (1, 4, 4), (1, 2, 2))
VIDEO_SHAPES = ((8, 2, 2), (4, 2, 2), (8, 1, 1), (2, 2, 2), (4, 1, 1), (1, 2, 2), (2, 1, 1))
IMAGENET_STD = (0.229, 0.224, 0.225)
LARGEST = 1e3  # contrast that is told from more
HALVINGS = 12  # of the range of scores, in search of the limit that a budget needs


class Superpatches(nn.Module):
    """Pixels -> tokens, fewer than patches. It stands between a model's patch embedding and first layer.

    clip_size, patch_size: (frames, height, width) in pixels; dim: the tokens' width.
    superpatches: "contrast": a group's score is minus the root mean square of what averaging takes from
        its pixels, in units of 0 to 1; "dcts": the probability that a `PolicyNet` gives it.
    superpatch_tokens: so many tokens of every clip (of every chunk, with base_window): the groups with the
        highest scores. Shapes are static.
    superpatch_threshold: instead, as many as a clip needs: groups with less contrast than this (0.03), or
        with more probability (0.5).
    superpatch_shapes: the groups that are allowed, (t, h, w) patches each, aligned to multiples of
        themselves; larger ones are chosen first. By default those of `IMAGE_SHAPES` or `VIDEO_SHAPES` that
        fit the grid. Patches at the end of an axis that fill no group stay single.
    superpatch_vectors: learn a vector for each shape, which starts at zero; CTS has none.
    superpatch_policy: timm's name of the policy's network.
    superpatch_std: by what the pixels were divided, by channel, for contrast; by default ImageNet's.
    clip_tokens: with a threshold, how many tokens each clip of the last forward pass has, (B); else None.
    CTS itself: "dcts", superpatch_shapes [(1, 2, 2)], a budget, no vectors, and a head that reads tokens
    before `Tokens.to_grid`.
    Raises ValueError where sizes do not fit each other.
    """

    def __init__(
        self,
        clip_size: Size3,
        patch_size: Size3,
        dim: int,
        *,
        superpatches: str,
        superpatch_tokens: int | None = None,
        superpatch_threshold: float | None = None,
        superpatch_shapes: Sequence[Size3] | None = None,
        superpatch_vectors: bool = True,
        superpatch_policy: str = "efficientnet_lite0",
        superpatch_std: Sequence[float] | None = None,
    ):
        super().__init__()
        if superpatches not in ("contrast", "dcts"):
            raise ValueError(f"superpatches={superpatches!r} is none of ['contrast', 'dcts']")
        if superpatch_tokens is not None and superpatch_threshold is not None:
            raise ValueError(
                f"superpatch_tokens={superpatch_tokens} and superpatch_threshold={superpatch_threshold}: "
                "only one of them says how many tokens there are"
            )
        self.grid = tuple(size // patch for size, patch in zip(clip_size, patch_size, strict=True))
        self.shapes = fitting_shapes(self.grid, superpatch_shapes)
        self.patches = math.prod(self.grid)
        for i, shape in enumerate(self.shapes):
            members = group_members(self.grid, shape)
            place = np.full((2, self.patches), len(members))  # of a patch: its group, its turn there
            place[:, members] = np.indices(members.shape)
            self.register_buffer(f"members_{i}", torch.tensor(members), persistent=False)
            self.register_buffer(f"place_{i}", torch.tensor(place), persistent=False)
        self.tokens, self.clip_tokens = superpatch_tokens, None
        default = 0.03 if superpatches == "contrast" else 0.5
        self.threshold = default if superpatch_threshold is None else superpatch_threshold
        if self.tokens is not None:
            self.check_budget(self.tokens)
        self.policy = None
        if superpatches == "dcts":
            self.policy = PolicyNet(patch_size, self.shapes, superpatch_policy).requires_grad_(False)
        std = torch.tensor(superpatch_std or IMAGENET_STD)
        self.register_buffer("std", std, persistent=False)
        self.vectors = nn.ParameterList(
            nn.Parameter(torch.zeros(dim)) for _ in self.shapes if superpatch_vectors
        )

    def check_budget(self, tokens: int) -> None:
        """Raises ValueError for a number of tokens that no clip can have."""
        fewest = fewest_tokens(self.grid, self.shapes)
        if not fewest <= tokens <= self.patches:
            raise ValueError(
                f"superpatch_tokens={tokens} must lie between {fewest} and {self.patches}: "
                f"a grid of {self.grid} patches in groups of {list(self.shapes)}"
            )

    def train(self, mode: bool = True) -> "Superpatches":
        """The policy stays in evaluation mode: in training mode the batch would decide, and its running
        statistics drift."""
        super().train(mode)
        if self.policy is not None:
            self.policy.eval()
        return self

    def forward(self, clip: Tensor, embed: PatchEmbed, positions: Tensor) -> Tokens:
        """(B, 3, T, H, W), the patch embedding, positions (1, t, h, w, C) -> `Tokens` (B, N, C).

        Single patches come first, then groups, the largest first, each in the order of their places.
        Clips with fewer tokens than others of their batch are padded.
        """
        clip = embed.checked(clip)
        pixels = self._pixels(clip, embed.patch_size)
        with torch.no_grad():
            owner = self.choose(self.scores(clip, pixels))
            number, n, token, order = self._numbered(owner)
        if self.tokens is None:
            self.clip_tokens = number
        if n == self.patches and (self.tokens or owner.is_meta or int(number.min()) == n):
            # nothing is merged; other processes wait for gradients of the vectors all the same
            return Tokens.of(embed(clip) + positions + sum(0 * vector.sum() for vector in self.vectors))
        x = F.linear(select(pixels, order), embed.proj.weight.flatten(1), embed.proj.bias)
        tokens = Tokens(x + F.embedding(order, self._positions(positions)), self.grid, token)
        sizes = tokens.sizes()
        padded = self.tokens is None and int(number.min()) < n
        return tokens._replace(weight=sizes, asked=(sizes > 0).float() if padded else None)

    def scores(self, clip: Tensor, pixels: Tensor | None = None) -> list[Tensor]:
        """Clips (B, 3, T, H, W) -> of each shape, how well each of its groups can be one token: (B, n)."""
        if self.policy is not None:
            return group_scores(self.policy(clip))
        return [-error.sqrt() for error in self._errors(pixels)]

    def choose(self, scores: Sequence[Tensor]) -> Tensor:
        """Scores (B, n) of each shape -> what stands for each patch, (B, P): less than P: a patch, itself;
        from P on: groups, numbered through all shapes in their order."""
        # pixels that are not finite are for the loss to tell: here they are the last to be merged; and of
        # huge ones a budget needs scores that a limit can lie below
        scores = [score.nan_to_num(-9.0, neginf=-9.0).clamp(min=-LARGEST) for score in scores]
        if self.tokens is None:
            limit = -self.threshold if self.policy is None else self.threshold
            accepted = self._accept(scores, torch.full_like(scores[0][:, :1], limit))
            room = [self.patches] * len(accepted)
        else:
            accepted = self._accept(scores, self._limit(scores))
            room = self._room(scores, accepted)
        owner = torch.arange(self.patches, device=scores[0].device).expand(scores[0].shape[0], -1)
        first = self.patches
        for i, (groups, most) in enumerate(zip(accepted, room, strict=True)):
            group, turn = self._place(i)
            # where a budget ends a group may have room for some of its patches only: others stay single
            share = F.pad(groups * (most + (most > 0)), (0, 1))[:, group]
            owner = torch.where(turn < share, first + group, owner)
            first += groups.shape[1]
        return owner

    def count(self, owner: Tensor) -> Tensor:
        """What stands for each patch (B, P), as of `choose` -> how many tokens these are, (B)."""
        return self._numbered(owner)[0]

    def _members(self, i: int) -> Tensor:
        return getattr(self, f"members_{i}")

    def _place(self, i: int) -> Tensor:
        return getattr(self, f"place_{i}")

    def _accept(self, scores: Sequence[Tensor], limit: Tensor) -> list[Tensor]:
        """The groups of each shape whose score exceeds the limit (B, 1), the largest first: bool (B, n)."""
        free, accepted = True, []
        for i, score in enumerate(scores):
            groups = score > limit
            if i:
                groups = groups & free[:, self._members(i)].all(-1)
            accepted.append(groups)
            free = free & ~F.pad(groups, (0, 1))[:, self._place(i)[0]]
        return accepted

    def _saved(self, accepted: Sequence[Tensor]) -> Tensor:
        """How many tokens fewer than patches: (B, 1)."""
        return sum(
            groups.sum(1, keepdim=True) * (math.prod(shape) - 1)
            for groups, shape in zip(accepted, self.shapes, strict=True)
        )

    def _limit(self, scores: Sequence[Tensor]) -> Tensor:
        """The highest limit (B, 1) found that leaves no more tokens than the budget."""
        every = torch.cat(list(scores), 1)
        low, high = every.amin(1, keepdim=True) - 1e-3, every.amax(1, keepdim=True)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            enough = self._saved(self._accept(scores, middle)) >= self.patches - self.tokens
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        return low

    def _room(self, scores: Sequence[Tensor], accepted: Sequence[Tensor]) -> list[Tensor]:
        """How many tokens each group may save, (B, n), when those of higher scores come first: so that all
        save what the budget asks for, and no more."""
        groups, sizes = torch.cat(list(accepted), 1), [groups.shape[1] for groups in accepted]
        saves = torch.cat([g * (math.prod(s) - 1) for g, s in zip(accepted, self.shapes, strict=True)], 1)
        every = torch.cat(list(scores), 1).masked_fill(~groups, -torch.inf)
        order = highest_first(every)
        in_order = saves.gather(1, order)
        left = (self.patches - self.tokens) - (in_order.cumsum(1) - in_order)
        room = torch.zeros_like(saves).scatter(1, order, left.clamp(min=0))
        return list(torch.minimum(room, saves).split(sizes, 1))

    def _numbered(self, owner: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
        """What stands for each patch (B, P) -> how many tokens each clip has (B), the most, the token of
        each patch (B, P), what each token is (B, n)."""
        candidates = self.patches + sum(len(self._members(i)) for i in range(len(self.shapes)))
        kept = owner.new_zeros(owner.shape[0], candidates).scatter(1, owner, 1)
        number, place = kept.sum(1), kept.cumsum(1) - 1
        n = self.tokens or (self.patches if owner.is_meta else int(number.max()))  # meta: the most
        slot = torch.where(kept > 0, place, n)
        index = torch.arange(candidates, device=owner.device).expand_as(slot)
        order = owner.new_zeros(owner.shape[0], n + 1).scatter(1, slot, index)[:, :n]
        return number, n, place.gather(1, owner), order

    def _pixels(self, clip: Tensor, patch_size: Size3) -> Tensor:
        """(B, 3, T, H, W) -> the pixels of all patches, and of all groups as a patch's: (B, M, K)."""
        parts = [split_tubelets(x, patch_size) for x in self._pyramid(clip, 2, _means_of_pixels)]
        counts = [math.prod(part.shape[1:4]) for part in parts]
        rows = clip.new_empty(clip.shape[0], sum(counts), math.prod(parts[0].shape[4:]))
        for row, part in zip(rows.split(counts, 1), parts, strict=True):  # each pixel is copied once
            row.view(part.shape).copy_(part)
        return rows

    def _positions(self, positions: Tensor) -> Tensor:
        """(1, t, h, w, C) -> of all patches and then of all groups: (M, C)."""
        patches, *groups = (x.flatten(0, 3) for x in self._pyramid(positions, 1, _means_of_places))
        if len(self.vectors):
            groups = [x + vector for x, vector in zip(groups, self.vectors, strict=True)]
        return torch.cat([patches, *groups])

    def _pyramid(self, x: Tensor, first: int, average: Callable[[Tensor, Size3], Tensor]) -> list[Tensor]:
        """x, and for each shape x with each of its blocks averaged to one; first: of the axes of time and
        space; average: does so (x, block)."""
        means = {(1, 1, 1): x}
        for shape in reversed(self.shapes):  # of the largest that it consists of
            parts = [part for part in means if not any(s % p for s, p in zip(shape, part, strict=True))]
            part = max(parts, key=math.prod)
            x = means[part]
            for axis, (n, s, p) in enumerate(zip(self.grid, shape, part, strict=True), first):
                x = x.narrow(axis, 0, x.shape[axis] * (n // s * s) // (n // p * p))
            means[shape] = average(x, tuple(s // p for s, p in zip(shape, part, strict=True)))
        return [means[shape] for shape in ((1, 1, 1), *self.shapes)]

    def _errors(self, pixels: Tensor) -> list[Tensor]:
        """Of each shape (B, n), the mean square of what averaging takes from a group's pixels, in units of
        0 to 1: their energy less that of their means."""
        norm = torch.linalg.vector_norm(pixels.unflatten(2, (3, -1)), dim=3, dtype=torch.float32)
        energy = (norm * self.std).square().mean(2) * 3 / pixels.shape[2]
        members = [self._members(i) for i in range(len(self.shapes))]
        patches, *groups = energy.split([self.patches, *map(len, members)], 1)
        return [
            (patches[:, index].mean(2) - mean).clamp(min=0)
            for index, mean in zip(members, groups, strict=True)
        ]


def _means_of_places(x: Tensor, block: Size3) -> Tensor:
    """(B, T, H, W, C) -> the mean of each block (t, h, w)."""
    x = x.unflatten(1, (-1, block[0])).mean(2) if block[0] > 1 else x
    if block[1:] == (1, 1):
        return x
    images = x.flatten(0, 1).movedim(-1, 1)
    return F.avg_pool2d(images, block[1:]).movedim(1, -1).unflatten(0, x.shape[:2])


def _means_of_pixels(x: Tensor, block: Size3) -> Tensor:
    """(B, 3, T, H, W) -> the mean of each block (t, h, w)."""
    x = x.unflatten(2, (-1, block[0])).mean(3) if block[0] > 1 else x
    return x if block[1:] == (1, 1) else F.avg_pool2d(x.flatten(0, 2), block[1:]).unflatten(0, x.shape[:3])


class PolicyNet(nn.Module):
    """Whether groups of patches can be one token: two logits for each group, no and yes. CTS's, for groups
    of any size: each shape has a linear layer on the deepest features whose cells are no larger than it.

    A clip's tubelets are averaged to one frame each. For groups over time, features come as their mean and
    as how far they spread.
    """

    def __init__(
        self, patch_size: Size3, shapes: Sequence[Size3], backbone: str = "efficientnet_lite0"
    ) -> None:
        super().__init__()
        if not timm.is_model(backbone):
            raise ValueError(f"superpatch_policy={backbone!r}: timm has no such model")
        self.patch_size, self.shapes = tuple(patch_size), [tuple(shape) for shape in shapes]
        self.backbone = timm.create_model(backbone, features_only=True).to(
            memory_format=torch.channels_last
        )
        if isinstance(self.backbone, EfficientNetFeatures | MobileNetV3Features):  # norms follow at once
            fold_norms(self.backbone)
        info, self.levels = self.backbone.feature_info, []
        self.strides = info.reduction()
        for shape in self.shapes:
            fits = [i for i, stride in enumerate(self.strides) if stride <= min(self._side(shape))]
            self.levels.append(max(fits, default=0))
        self.heads = nn.ModuleList(
            nn.Linear(info.channels()[level] * (1 + (shape[0] > 1)), 2)
            for level, shape in zip(self.levels, self.shapes, strict=True)
        )

    def forward(self, clip: Tensor) -> list[Tensor]:
        """(B, 3, T, H, W), or (B, 3, H, W) of images -> of each shape (B, 2, t, h, w): a cell a group."""
        clip = clip[:, :, None] if clip.ndim == 4 else clip
        frames = clip.unflatten(2, (-1, self.patch_size[0])).mean(3)
        grid = [size // patch for size, patch in zip(clip.shape[2:], self.patch_size, strict=True)]
        frames = frames.transpose(1, 2).flatten(0, 1)
        features = self.backbone(frames.contiguous(memory_format=torch.channels_last))  # faster everywhere
        logits = []
        for shape, level, head in zip(self.shapes, self.levels, self.heads, strict=True):
            t, h, w = (n // s for n, s in zip(grid, shape, strict=True))
            rows, columns = (
                -(-n * side // self.strides[level])
                for n, side in zip((h, w), self._side(shape), strict=True)
            )
            x = F.adaptive_avg_pool2d(features[level][..., :rows, :columns], (h, w))
            x = x.unflatten(0, (-1, grid[0]))[:, : t * shape[0]].unflatten(1, (t, shape[0]))
            pooled = x.mean(2) if shape[0] == 1 else torch.cat([x.mean(2), x.amax(2) - x.amin(2)], 2)
            logits.append(head(pooled.movedim(2, -1)).movedim(-1, 1))
        return logits

    @torch.enable_grad()
    def learn(self) -> None:
        """Let all learn that any logit depends on. Deeper stages get no gradient, for which processes that
        train together would wait."""
        self.requires_grad_(True).eval()
        parameters = list(self.backbone.parameters())
        features = self.backbone(parameters[0].new_zeros(1, 3, 64, 64))
        read = sum(features[level].sum() for level in self.levels)
        gradients = torch.autograd.grad(read, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def _side(self, shape: Size3) -> tuple[int, int]:
        """Height and width of a group in pixels."""
        return shape[1] * self.patch_size[1], shape[2] * self.patch_size[2]


def fold_norms(network: nn.Module) -> None:
    """In evaluation, convolutions do the work of the batch norms right behind them. Weights and their names
    stay as they are: they are multiplied anew each time, which costs next to nothing."""
    for module in network.modules():
        for conv, norm in itertools.pairwise(module.children()):
            if type(conv) is nn.Conv2d and conv.bias is None and isinstance(norm, nn.BatchNorm2d):
                conv.forward, norm.forward = partial(_convolved, conv, norm), partial(_activated, norm)


def _convolved(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    if norm.training:
        return nn.Conv2d.forward(conv, x)
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    return conv._conv_forward(x, conv.weight * scale[:, None, None, None], bias)


def _activated(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    if norm.training:
        return type(norm).forward(norm, x)
    return norm.act(norm.drop(x)) if isinstance(norm, BatchNormAct2d) else x


def group_scores(logits: Sequence[Tensor]) -> list[Tensor]:
    """A `PolicyNet`'s logits (B, 2, t, h, w) of each shape -> the probability of yes, (B, n)."""
    return [values.float().softmax(1)[:, 1].flatten(1) for values in logits]


def group_targets(
    labels: Tensor,
    shapes: Sequence[Size3],
    patch_size: Size3,
    *,
    ignore: int = 255,
    unsure_at_border: bool = False,
) -> list[Tensor]:
    """What a `PolicyNet` is to say, by CTS's rule: 1 for a group whose pixels all have one label, else 0.

    labels: (B, H, W), or (B, T, H, W) of clips, whole numbers below 2^24. -> of each shape (B, t, h, w).
    Ignored pixels count as a class of their own: a group of nothing else has 1, one with a class too 0.
    unsure_at_border: in the outer ring of groups of an image, one class and ignored pixels are `ignore`,
        left out of the loss (CTS on ADE20K, which also reads label 0 as ignored).
    """
    labels = (labels if labels.ndim == 4 else labels[:, None]).float()
    targets = []
    for shape in shapes:
        block = [s * p for s, p in zip(shape, patch_size, strict=True)]
        low, high = -F.max_pool3d(-labels, block), F.max_pool3d(labels, block)
        target = (low == high).long()
        if unsure_at_border:
            # with ignored pixels as the lowest, and as the highest, of all labels: the others' extremes
            low = -F.max_pool3d(-labels.masked_fill(labels == ignore, torch.inf), block)
            high = F.max_pool3d(labels.masked_fill(labels == ignore, -torch.inf), block)
            inside = torch.zeros_like(target, dtype=torch.bool)
            inside[..., 1:-1, 1:-1] = True
            target[(low == high) & (target == 0) & ~inside] = ignore
        targets.append(target)
    return targets


def agreement_targets(grid: Tensor, shapes: Sequence[Size3], *, threshold: float = 0.9) -> list[Tensor]:
    """What a `PolicyNet` is to say where there are no labels: 1 for a group whose patches a plain model
    makes alike, all of a cosine above the threshold with their mean, else 0.

    grid: (B, t, h, w, C), a model's patches after some layer. -> of each shape (B, t, h, w).
    """
    patches, targets = F.normalize(grid.flatten(1, 3).float(), dim=-1), []
    for shape in shapes:
        count = [n // s for n, s in zip(grid.shape[1:4], shape, strict=True)]
        groups = patches[:, torch.tensor(group_members(tuple(grid.shape[1:4]), shape), device=grid.device)]
        alike = (groups * F.normalize(groups.mean(2, keepdim=True), dim=-1)).sum(-1)
        targets.append((alike.amin(2) > threshold).long().unflatten(1, count))
    return targets


def policy_loss(logits: Sequence[Tensor], targets: Sequence[Tensor], *, ignore: int = 255) -> Tensor:
    """Cross-entropy, the mean over each shape's groups and then over shapes; of all ignored groups 0."""
    losses = []
    for values, target in zip(logits, targets, strict=True):
        loss = F.cross_entropy(values.float(), target, ignore_index=ignore, reduction="sum")
        losses.append(loss / (target != ignore).sum().clamp(min=1))
    return torch.stack(losses).mean()


def fitting_shapes(grid: Size3, shapes: Sequence[Size3] | None = None) -> list[Size3]:
    """The shapes that fit a grid of patches, the largest first; None: the default table.

    Raises ValueError for a shape that does not fit, is one patch, or is there twice; for none at all.
    """
    if shapes is None:
        table = IMAGE_SHAPES if grid[0] == 1 else VIDEO_SHAPES
        shapes = [shape for shape in table if all(s <= n for s, n in zip(shape, grid, strict=True))]
    shapes = [tuple(shape) for shape in shapes]
    for shape in shapes:
        fits = len(shape) == 3 and all(1 <= s <= n for s, n in zip(shape, grid, strict=True))
        if not fits or math.prod(shape) == 1 or shapes.count(shape) > 1:
            raise ValueError(
                f"superpatch_shapes={shapes}: each must be there once and have more than one patch, at "
                f"most {grid} (t, h, w)"
            )
    if not shapes:
        raise ValueError(f"superpatch_shapes={shapes}: there is none, of a grid of {grid} patches")
    return sorted(shapes, key=math.prod, reverse=True)


def group_members(grid: Size3, shape: Size3) -> np.ndarray:
    """The patches of each group: (groups, patches in one), both in the order of their places."""
    (a, t), (b, h), (c, w) = ((n // s, s) for n, s in zip(grid, shape, strict=True))
    index = np.arange(math.prod(grid)).reshape(grid)[: a * t, : b * h, : c * w]
    return index.reshape(a, t, b, h, c, w).transpose(0, 2, 4, 1, 3, 5).reshape(a * b * c, -1)


def fewest_tokens(grid: Size3, shapes: Sequence[Size3]) -> int:
    """How many tokens an even clip becomes."""
    token, groups = np.arange(math.prod(grid)), math.prod(grid)
    free = token >= 0
    for shape in shapes:
        members = group_members(grid, shape)
        members = members[free[members].all(1)]
        free[members] = False
        token[members] = groups + np.arange(len(members))[:, None]
        groups += len(members)
    return len(np.unique(token))
