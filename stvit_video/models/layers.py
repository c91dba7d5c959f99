"""The one transformer block. Who asks (query) and who is asked (context) is the caller's choice.

Parameter names are timm's (`norm1`, `attn.qkv`, `attn.proj`, `ls1`, `norm2`, `mlp.fc1`, ...), which
every ViT checkpoint speaks.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from timm.layers import LayerScale, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Regroup = Callable[[Tensor], Tensor]


class Attention(nn.Module):
    """Multi-head attention of `x` over `context` (over itself without one), fused.

    regroup: rearranges the projected context (B, M, C) into the keys, and then the values, of each group
        of queries (B', M', C), so that what several groups ask (overlapping windows) is projected once.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if not isinstance(num_heads, int) or dim % num_heads:
            raise ValueError(f"embed_dim {dim} does not divide into num_heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        bias: Tensor | None = None,
        regroup: Regroup | None = None,
    ) -> Tensor:
        """(B, N, C) [, (B, M, C), bias broadcastable to (B, heads, N, M)] -> (B, N, C)."""
        return self.attend(*self.project(x, context, regroup), bias)

    def weights(
        self,
        x: Tensor,
        context: Tensor | None = None,
        bias: Tensor | None = None,
        regroup: Regroup | None = None,
    ) -> Tensor:
        """The attention matrix that `forward` never builds: (B, heads, N, M), rows sum to 1."""
        q, k, _ = self.project(x, context, regroup)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, heads, N, C / heads), twice (B, heads, M, C / heads) -> (B, N, C)."""
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).flatten(2))

    def project(
        self, x: Tensor, context: Tensor | None = None, regroup: Regroup | None = None
    ) -> list[Tensor]:
        """-> queries of x, keys and values of the context: (B, heads, N or M, C / heads) each."""
        if context is None:
            parts = self.qkv(x).chunk(3, -1)
        else:  # the same weights, each row of them applied only to those it serves
            dim, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
            q = F.linear(x, weight[:dim], bias[:dim])
            kv = F.linear(context, weight[dim:], bias[dim:])
            keys_values = kv.chunk(2, -1)  # regrouped one by one: a CPU is slow at new, large memory
            parts = (q, *(keys_values if regroup is None else map(regroup, keys_values)))
        return [p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in parts]


class DropPath(nn.Module):
    """Stochastic depth: in training, zeros for a share `rate` of the clips; the others are scaled up.

    "Deep Networks with Stochastic Depth" (ECCV 2016); drawn as timm draws it.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, windows: int = 1) -> Tensor:
        """(B * windows, ...) -> the same shape; windows of a clip share its draw."""
        if not self.training or not self.rate:
            return x
        kept = x.new_empty(x.shape[0] // windows, *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate).repeat_interleave(windows, 0)


class Block(nn.Module):
    """Pre-norm block: `x + attn(norm1(x), norm1(context))`, then `x + mlp(norm2(x))`.

    One LayerNorm serves queries and keys (as in the authors' released code), so
    `block(x) == block(x, context=x)` and a pretrained ViT layer can take any role.

    attention: what makes `attn` of (dim, num_heads).
    layer_scale: initial value of the residual branches' learned scale; None: no scale.
    residual: False keeps the queries out of what the attention gives: `attn(norm1(x), norm1(context))`.
    checkpointing: recompute activations in the backward pass instead of keeping them.
    parts: the methods beside `forward` that use parameters; who shards blocks must know them.
    """

    parts = ("attend", "transform")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
        attention: Callable[[int, int], nn.Module] = Attention,
        residual: bool = True,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.residual, self.checkpointing = residual, checkpointing
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls1, self.ls2 = (
            nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2)
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, context: Tensor | None = None, *, windows: int = 1, **how) -> Tensor:
        """(B, N, C) [, (B, M, C)] -> (B, N, C); whatever shape, `bias` and `regroup` `attn` takes.

        windows: how many rows of x belong to one clip.
        """
        return self._run(self._forward, x, context, windows, **how)

    def attend(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The first half alone: (B, N, C) -> (B, N, C) after attention; the keys, averaged over heads
        (B, N, C / heads)."""
        return self._run(self._attend, x, bias)

    def transform(self, x: Tensor) -> Tensor:
        """The second half alone, the MLP: (B, N, C) -> (B, N, C)."""
        return self._run(self._transform, x)

    def attention_map(self, x: Tensor, context: Tensor | None = None, **how) -> Tensor:
        """How much each of `x` takes from each of `context`: (B, heads, N, M)."""
        return self.attn.weights(*self._normed(x, context), **how)

    def _run(self, part: Callable, *args, **how) -> Any:
        if self.checkpointing and self.training:
            return checkpoint(part, *args, use_reentrant=False, **how)
        return part(*args, **how)

    def _forward(self, x: Tensor, context: Tensor | None, windows: int, **how) -> Tensor:
        taken = self.ls1(self.attn(*self._normed(x, context), **how))
        # without a residual path to drop would leave zeros: the authors' STViT-R drops none there
        return self._transform(x + self.drop_path(taken, windows) if self.residual else taken, windows)

    def _attend(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = self.attn.project(self.norm1(x))
        return x + self.drop_path(self.ls1(self.attn.attend(q, k, v, bias))), k.mean(1)

    def _transform(self, x: Tensor, windows: int = 1) -> Tensor:
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))), windows)

    def _normed(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.norm1(x), None if context is None else self.norm1(context)


def init_weights(model: nn.Module) -> None:
    """Linear layers and undecayed tables: a normal distribution of 0.02, cut off; their biases: zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    undecayed = model.no_weight_decay()
    for name, table in model.named_parameters():  # in their order: a set's is another in every process
        if name in undecayed:
            nn.init.trunc_normal_(table, std=0.02)
