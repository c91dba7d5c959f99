"""Early exits: tokens that are predicted with confidence leave between layers, and their prediction stands.

"Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation" (DToP, ICCV 2023), with its
attention-to-mask heads or with linear ones, which cost next to nothing. Tokens that leave are gone from all
later layers, as queries and as keys; a superpatch leaves with all its patches.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .atm import ATMHead, MaskLogits, spread
from .tokens import Tokens
from .vit import VideoViT


class Exit(NamedTuple):
    """What an exit has said of K classes and P patches, and who has left there.

    layer: after how many layers.
    masks: (B, K, P) logits. A patch that has left before keeps those of the exit where it left.
    classes: (B, K, 2), an ATM head's class logits; None: a linear head's, masks are logits of a softmax.
    scores: (B, K, P) of 0 to 1, float32; the confidence in each class.
    active: (B, P) bool, patches whose token was still there; left: those whose token left here.
    tokens: (B) how many tokens were still there; leaving: (B, K) how many left, by class.
    place: (B, P), the token that stood for each patch, -1 where it had left before.
    """

    layer: int
    masks: Tensor
    classes: Tensor | None
    scores: Tensor
    active: Tensor
    left: Tensor
    tokens: Tensor
    leaving: Tensor
    place: Tensor


class EarlyExits(nn.Module):
    """Exits after some layers of a ViT, each with a head of its own.

    in_dim: width of the tokens. layers: after how many layers, each; the head after the last layer of all
    is the final one, where nobody leaves.
    head: "linear", or "atm": DToP's, with `dim`, `num_heads` and `num_layers` of its own.
    threshold: a token leaves when its confidence is greater; 1: none does.
    keep: of each class as many stay, the most confident of those who might leave, as context.
    final_factor: ATM heads weigh the masks of those who have left before by their own class probabilities,
        as in DToP; otherwise all that was said where they left stands.
    Raises ValueError for another head.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        layers: Sequence[int],
        *,
        head: str = "linear",
        threshold: float = 0.9,
        keep: int = 5,
        final_factor: bool = False,
        dim: int = 384,
        num_heads: int = 12,
        num_layers: int = 3,
    ):
        super().__init__()
        makers = {
            "linear": partial(LinearExit, in_dim, num_classes),
            "atm": partial(ATMHead, in_dim, dim, num_heads, num_layers, 1, num_classes, binary=True),
        }
        if head not in makers:
            raise ValueError(f"exit_head={head!r} is none of {list(makers)}")
        self.layers, self.threshold = sorted(layers), threshold
        self.keep, self.final_factor = keep, final_factor
        self.heads = nn.ModuleDict({str(layer): makers[head]() for layer in self.layers})

    def forward(
        self, model: VideoViT, clip: Tensor, layers: Sequence[int] | None = None
    ) -> tuple[list[Tokens], list[Exit]]:
        """A ViT and (B, 3, T, H, W) -> its tokens after `layers` (by default the last), and all exits.

        `exits[-1].scores` and `.masks` are the prediction where the last layer has an exit. Another head's,
        of the tokens' grids, is to be replaced by `exits[-1].masks` where patches have left
        (`tokens.places() < 0`).
        """
        exits: list[Exit] = []

        def let_leave(layer: int, tokens: Tokens) -> Tokens:
            threshold = 1.0 if layer == len(model.blocks) else self.threshold
            exit, gone = self._exit(layer, tokens, threshold, exits[-1] if exits else None)
            exits.append(exit)
            return tokens.leave(gone)

        return model.levels(clip, layers, {n: partial(let_leave, n) for n in self.layers}), exits

    def _exit(
        self, layer: int, tokens: Tokens, threshold: float, before: Exit | None
    ) -> tuple[Exit, Tensor]:
        """-> the exit, and which tokens leave (B, N)."""
        said, real = self.heads[str(layer)].of_tokens(tokens), tokens.sizes() > 0
        scores, places = said.scores(), tokens.places()
        gone, best = leaving(scores, real, threshold, self.keep), scores.argmax(1)
        active = places >= 0
        masks, scores = spread(said.masks, tokens), spread(scores, tokens)
        if before is not None:
            masks = torch.where(active[:, None], masks, before.masks)
            stands = MaskLogits(said.classes, masks).scores() if self.final_factor else before.scores
            scores = torch.where(active[:, None], scores, stands)
        left = active & gone.gather(1, places.clamp(min=0))
        by_class = best.new_zeros(scores.shape[:2]).scatter_add(1, best, gone.long())
        return Exit(layer, masks, said.classes, scores, active, left, real.sum(1), by_class, places), gone


class LinearExit(nn.Module):
    """A norm and a linear layer: the classes' logits of each token."""

    def __init__(self, in_dim: int, num_classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_dim, eps=1e-6)
        self.linear = nn.Linear(in_dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def of_tokens(self, tokens: Tokens) -> MaskLogits:
        """Tokens (B, N, in_dim) -> logits (B, K, N)."""
        return MaskLogits(None, self.linear(self.norm(tokens.x)).transpose(1, 2))


def leaving(scores: Tensor, real: Tensor, threshold: float, keep: int) -> Tensor:
    """Scores of tokens (B, K, N), and which are no padding (B, N) -> which leave: (B, N) bool.

    Those whose best score exceeds the threshold, but for the `keep` most confident of each class.
    """
    confidence, best = scores.detach().max(1)
    over = real & (confidence > threshold)
    if threshold >= 1 or not keep:
        return over
    of_class = torch.arange(scores.shape[1], device=best.device)[:, None] == best[:, None]
    ranked = confidence[:, None].where(of_class & over[:, None], -1)
    values, index = ranked.topk(min(keep, scores.shape[2]), dim=2)  # (B, K, keep); -1: no such token
    stay = torch.zeros_like(over, dtype=torch.int32)
    stay = stay.scatter_add(1, index.flatten(1), (values.flatten(1) >= 0).int())
    return over & (stay == 0)
