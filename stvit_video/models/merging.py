"""Merging the tokens that are most alike.

"Token Merging: Your ViT But Faster" (ToMe, ICLR 2023), section 3: bipartite soft matching.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokens import Tokens, highest_first, in_float32, select


def merge(
    tokens: Tokens, keys: Tensor, n: int | None, *, r: int | None = None, proportional: bool = True
) -> Tokens:
    """Tokens (B, N, C) with keys (B, N, D) -> n of them, or r fewer, as `merge_similar` has it.

    proportional: from now on, a token is asked as often as it has patches in it (ToMe's equation 1).
    """
    size = None if tokens.token is None else tokens.sizes()
    x, weight, token = merge_similar(tokens.x, keys, n, size, r=r)
    if tokens.token is not None:
        token = token.gather(1, tokens.places().clamp(min=0)).masked_fill(tokens.token < 0, -1)
    asked = weight if proportional else None
    if asked is None and tokens.asked is not None:
        asked = (weight > 0).float()  # there may be padding
    return tokens._replace(x=x, token=token, weight=weight, asked=asked)


def merge_similar(
    x: Tensor, keys: Tensor, n: int | None, size: Tensor | None = None, *, r: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, N, C) with keys (B, N, D) -> n of them (B, n, C), their sizes (B, n), and which of these
    every token has become or joined (B, N).

    Bipartite soft matching: every second token looks for the other one with the most similar key (cosine),
    and those with the most similar partner join it. A round leaves half of the tokens or more, so there
    are as many rounds as n asks for; keys are merged as the tokens are. Sizes (B or 1, N; None: 1 each) are
    float32, no gradient; 0: padding, and every clip becomes what it would alone, padded.

    r: one round that takes so many, at most half; n counts for nothing then.
    """
    dim, dtype = x.shape[-1], x.dtype
    # sums over the patches of tokens, keys and size, in float32: bfloat16 counts to 256 only
    sums = torch.cat([part.float() for part in (x, keys.detach(), keys.new_ones(*x.shape[:2], 1))], -1)
    if size is not None:
        sums = sums * size[..., None]
    joined = index = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    number = (sums[..., -1:] > 0).sum(1)  # of real tokens in each clip: (B, 1)
    goal = n if r is None else number - (number // 2).clamp(max=r)
    n = n if r is None else max(x.shape[1] - r, -(-x.shape[1] // 2))
    while sums.shape[1] > n:
        width = max(n, -(-sums.shape[1] // 2))
        index = index[:, : sums.shape[1]]
        similarity, partner = _most_similar(sums[..., dim:-1].detach(), index >= number)
        gone = torch.minimum((number - goal).clamp(min=0), number // 2)
        order = highest_first(similarity)  # padding comes last
        stays = order.argsort(1) >= gone
        place = torch.zeros_like(index)
        place[:, ::2] = torch.where(stays, stays.cumsum(1) - 1, partner + (number + 1) // 2 - gone)
        place[:, 1::2] = (number + 1) // 2 - gone + index[:, : sums.shape[1] // 2]
        place = torch.where(gone > 0, place, index)  # a clip that is done keeps its order
        place = place.clamp(max=width - 1)  # of padding, which adds nothing
        order = torch.cat([index[:, 1::2], 2 * order], 1)  # the most similar are added first
        sums = sums.new_zeros(x.shape[0], width, sums.shape[-1]).scatter_add(
            1, place.gather(1, order)[..., None].expand(-1, -1, sums.shape[-1]), select(sums, order)
        )
        number, joined = number - gone, place.gather(1, joined)
    size = sums[..., -1].detach()
    return (sums[..., :dim] / size.clamp(min=1)[..., None]).to(dtype), size, joined


def _most_similar(keys: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (B, N, D), padding (B, N) -> of every second token the similarity to the other most like it,
    -inf where either is padding, and which (B, N / 2)."""
    keys = F.normalize(keys, dim=-1)
    with in_float32(keys):  # rounded, many were alike
        similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    return similarity.masked_fill_(padding[:, ::2, None] | padding[:, None, 1::2], -torch.inf).max(-1)
