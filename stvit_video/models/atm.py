"""Attention to mask: a query for each class asks the tokens, and whom it asks is its mask.

"SegViT: Semantic Segmentation with Plain Vision Transformers" (NeurIPS 2022), section 3.2; with `binary`
the head of "Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation" (ICCV 2023),
which reads one level and decides about each class alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tokens import Tokens, in_float32


class MaskLogits(NamedTuple):
    """What a head says of K classes and P patches (or N tokens), as logits.

    classes: (B, K, K + 1), what each class's query finds, the last: nothing; binary: (B, K, 2), whether
    its class is there, the first: yes; None: masks are the logits of one softmax over the classes.
    masks: (B, K, P).
    """

    classes: Tensor | None
    masks: Tensor

    def scores(self) -> Tensor:
        """How much each class is at each place: (B, K, P), of 0 to 1, in float32; no distribution."""
        if self.classes is None:
            return self.masks.float().softmax(1)
        finds, masks = self.classes.float().softmax(-1), self.masks.float().sigmoid()
        if finds.shape[-1] == 2:
            return finds[..., :1] * masks
        with in_float32(masks):
            return finds[..., :-1].transpose(1, 2) @ masks  # a query may vote for any class


class ATMHead(nn.Module):
    """Class and mask logits of the tokens after several layers: SegViT's head.

    in_dim: width of the tokens; dim: of the head. num_layers: of each level, num_levels: how many levels.
    binary: two logits a class instead of K + 1, as in Dynamic Token Pruning.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        num_heads: int,
        num_layers: int,
        num_levels: int,
        num_classes: int,
        *,
        binary: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__()
        if num_classes == 1 and not binary:
            raise ValueError(
                "num_classes=1 of an ATM head: needs binary=True (its two logits say yes or no)"
            )
        self.q = nn.Embedding(num_classes, dim)
        self.input_proj = nn.ModuleList(nn.Linear(in_dim, dim) for _ in range(num_levels))
        self.proj_norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(num_levels))
        self.decoder = nn.ModuleList(
            nn.ModuleList(ATMLayer(dim, num_heads, dropout) for _ in range(num_layers))
            for _ in range(num_levels)
        )
        self.class_embed = nn.Linear(dim, 2 if binary else num_classes + 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, levels: Sequence[Tokens]) -> list[MaskLogits]:
        """Tokens (B, N, in_dim) after some layers, the shallowest first -> `MaskLogits` over the P patches
        for each level, the deepest first: the last is the prediction, the others help training.

        Queries go from level to level, and masks add up. Any tokens are taken: a superpatch's mask is that
        of its patches, padding is not asked. A patch that has left has what it had at deeper levels, or 0.
        Raises ValueError where there are not as many levels as the head has.
        """
        if len(levels) != len(self.decoder):
            raise ValueError(f"{len(levels)} levels for an ATM head of num_levels={len(self.decoder)}")
        query, masks, outputs = self._queries(levels[0]), 0, []
        for i, tokens in enumerate(reversed(levels)):
            query, of_tokens = self._level(i, query, tokens)
            masks = masks + spread(of_tokens, tokens)
            outputs.append(MaskLogits(self.class_embed(query), masks))
        return outputs

    def of_tokens(self, tokens: Tokens) -> MaskLogits:
        """Tokens (B, N, in_dim) -> `MaskLogits` over these N tokens, of a head with one level."""
        query, masks = self._level(0, self._queries(tokens), tokens)
        return MaskLogits(self.class_embed(query), masks)

    def _queries(self, tokens: Tokens) -> Tensor:
        return self.q.weight.expand(tokens.x.shape[0], -1, -1)

    def _level(self, i: int, query: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        context = self.proj_norm[i](self.input_proj[i](tokens.x))
        bias = tokens._replace(class_token=None).bias()
        for layer in self.decoder[i]:
            query, masks = layer(query, context, bias)
        return query, masks


class ATMLayer(nn.Module):
    """Queries ask each other, then the tokens, then an MLP; norms come after each. Names are SegViT's."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.multihead_attn = MaskAttention(dim, num_heads, dropout)
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, context: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, K, C), (B, N, C) -> (B, K, C), masks (B, K, N): whom the queries asked, before they knew."""
        asked, _ = self.self_attn(query, query, query, need_weights=False)
        query = self.norm1(query + self.dropout(asked))
        taken, masks = self.multihead_attn(query, context, bias)
        query = self.norm2(query + self.dropout(taken))
        hidden = self.dropout(F.relu(self.linear1(query)))
        return self.norm3(query + self.dropout(self.linear2(hidden))), masks


class MaskAttention(nn.Module):
    """Attention that also gives its scores before the softmax, averaged over heads."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} of an ATM head does not divide into num_heads={num_heads}")
        self.num_heads, self.dropout = num_heads, dropout
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, query: Tensor, context: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = self.q(query), self.k(context), self.v(context)
        # the mean over heads of their scaled products is one product over all features
        masks = q @ k.transpose(1, 2) * ((q.shape[-1] // self.num_heads) ** -0.5 / self.num_heads)
        heads = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        taken = F.scaled_dot_product_attention(*heads, attn_mask=bias, dropout_p=dropout)
        return self.proj(taken.transpose(1, 2).flatten(2)), masks


def spread(of_tokens: Tensor, tokens: Tokens) -> Tensor:
    """Values of N tokens (B, K, N) -> of their patches (B, K, P), copied; 0 where one has left."""
    if tokens.token is None:
        return of_tokens
    token = tokens.places()[:, None]
    values = of_tokens.gather(2, token.clamp(min=0).expand(-1, of_tokens.shape[1], -1))
    return values.masked_fill(token < 0, 0)


def resize(masks: Tensor, size: Sequence[int]) -> Tensor:
    """(B, K, t, h, w) -> (B, K, T, H, W), linear along each axis; where t is T, each frame bilinear."""
    if masks.shape[2] == size[0]:
        images = masks.transpose(1, 2).flatten(0, 1)
        images = F.interpolate(images, list(size[1:]), mode="bilinear", align_corners=False)
        return images.unflatten(0, (-1, size[0])).transpose(1, 2)
    return F.interpolate(masks, list(size), mode="trilinear", align_corners=False)


def atm_losses(
    outputs: Sequence[MaskLogits],
    labels: Tensor,
    grid: Sequence[int],
    *,
    mask_weight: float = 20.0,
    dice_weight: float = 1.0,
    num_masks: float | None = None,
    ignore: int = 255,
) -> dict[str, Tensor]:
    """SegViT's losses, weighted: "loss_ce", "loss_mask" (focal), "loss_dice" of the last output; of
    the others, the deepest first, with "_0", "_1", ... Their sum is to be minimised.

    labels: (B, H, W), or (B, T, H, W) of clips; grid: (t, h, w) of the patches.
    Query k is class k's: where the class is in the labels, it has to find the class (absent: nothing, which
    counts a tenth) and its mask. Ignored pixels are background of every class, as in SegViT.
    num_masks: how many classes are there over the batch, averaged over processes; by default this one's.
    """
    labels = labels if labels.ndim == 4 else labels[:, None]
    classes = torch.arange(outputs[0].masks.shape[1], device=labels.device)
    present = torch.stack([torch.isin(classes, image[image != ignore]) for image in labels])
    which, query = present.nonzero(as_tuple=True)
    truth = (labels[which] == query[:, None, None, None]).float()
    count = max(float(len(query)) if num_masks is None else num_masks, 1.0)
    losses = {}
    for i, (logits, masks) in enumerate(outputs):
        suffix = "" if i == len(outputs) - 1 else f"_{i}"
        absent = logits.shape[-1] - 1
        wanted = torch.where(present, 0 if absent == 1 else classes, absent)
        weight = logits.new_ones(absent + 1, dtype=torch.float32)
        weight[absent] = 0.1
        losses[f"loss_ce{suffix}"] = F.cross_entropy(logits.float().transpose(1, 2), wanted, weight)
        shown = resize(masks.float()[which, query][:, None].unflatten(-1, tuple(grid)), labels.shape[1:])
        focal, dice = _mask_losses(shown.flatten(1), truth.flatten(1))
        losses[f"loss_mask{suffix}"] = mask_weight * focal.sum() / count
        losses[f"loss_dice{suffix}"] = dice_weight * dice.sum() / count
    return losses


def _mask_losses(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Of masks (n, pixels): the focal loss (alpha 0.25, gamma 2) and the dice loss, (n) each."""
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    share = logits.sigmoid()
    missed = share + truth - 2 * share * truth  # 1 - the probability of the truth
    focal = ((0.75 - 0.5 * truth) * missed.square() * entropy).mean(1)
    dice = 1 - (2 * (share * truth).sum(1) + 1) / (share.sum(1) + truth.sum(1) + 1)
    return focal, dice
