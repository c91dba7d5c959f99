"""pytorchvideo's MViT, X3D and SlowFast as baselines: clips (B, 3, T, H, W) -> logits (B, classes).

The networks are pytorchvideo's own in the configurations of its hub, so that its checkpoints fit
``model.net`` (400 classes, standard sizes). What is added is what a caller of several models should
not have to know: the sizes each one takes, SlowFast's two pathways, X3D's softmax.

pytorchvideo takes seconds to import, so each function imports its part of it when called.
"""

import torch
from torch import Tensor, nn

SLOW_STEP = 4  # alpha of SlowFast: frames of the fast pathway to one of the slow pathway
TOTAL_STRIDE = 32  # input pixels to one of the last stage, in X3D and in SlowFast alike


class FixedClip(nn.Module):
    """A network for clips of one size; its state dict is the network's under the prefix ``net.``.

    With ``slow_step`` the network gets a list of two pathways, the slow one a frame in ``slow_step``, else
    the clip alone. Which frames are slow is decided once, where the model is built: the rule rounds floats
    down, and need not do so alike on every device.
    """

    def __init__(
        self, net: nn.Module, num_frames: int, image_size: int, slow_step: int | None = None
    ) -> None:
        super().__init__()
        self.net, self.clip_shape = net, (3, num_frames, image_size, image_size)
        slow_frames = None
        if slow_step is not None:
            # As in pytorchvideo's PackPathway: first and last frame included, the rest between.
            slow_frames = torch.linspace(0, num_frames - 1, num_frames // slow_step).long()
        self.register_buffer("slow_frames", slow_frames, persistent=False)

    def forward(self, clip: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, classes). Raises ValueError for a clip of another size."""
        if clip.shape[1:] != self.clip_shape:
            raise ValueError(
                f"clip of shape {tuple(clip.shape)}: the model was made for (B, C, T, H, W) with "
                f"(C, T, H, W) = {self.clip_shape} (num_frames, image_size)"
            )
        if self.slow_frames is None:
            return self.net(clip)
        return self.net([clip.index_select(2, self.slow_frames), clip])


def ptv_mvit_base_16x4(*, num_classes: int, num_frames: int = 16, image_size: int = 224) -> nn.Module:
    """MViT-B 16x4 (Fan et al. 2021, arXiv 2104.11227): (B, 3, T, H, W) -> logits (B, num_classes).

    Only the position embeddings have a shape that depends on the clip's size. Raises ValueError when
    ``num_frames`` is no multiple of 2 or ``image_size`` none of 4: the patch embedding, stride (2, 4, 4),
    would give more tokens than there are position embeddings.
    """
    _check("ptv_mvit_base_16x4", num_classes, num_frames, image_size, multiples=(2, 4))
    from pytorchvideo.models.hub import mvit_base_16x4

    net = mvit_base_16x4(temporal_size=num_frames, spatial_size=image_size, head_num_classes=num_classes)
    return FixedClip(net, num_frames, image_size)


def ptv_x3d_m(*, num_classes: int, num_frames: int = 16, image_size: int = 224) -> nn.Module:
    """X3D-M (Feichtenhofer 2020, arXiv 2004.04730): (B, 3, T, H, W) -> logits (B, num_classes).

    pytorchvideo's head ends in a softmax, while training too; here it is left off. The hub's ``x3d_m`` is
    `create_x3d` with its defaults and a size that it lets nobody change. No parameter's shape depends on
    the clip's size. Raises ValueError when ``image_size`` is below 32, the network's total stride.
    """
    _check("ptv_x3d_m", num_classes, num_frames, image_size)
    if image_size < TOTAL_STRIDE:
        raise ValueError(f"image_size={image_size} of ptv_x3d_m: must be at least {TOTAL_STRIDE}")
    from pytorchvideo.models.x3d import create_x3d

    net = create_x3d(
        input_clip_length=num_frames,
        input_crop_size=image_size,
        model_num_class=num_classes,
        head_activation=None,
    )
    return FixedClip(net, num_frames, image_size)


def ptv_slowfast_r50(*, num_classes: int, num_frames: int = 32, image_size: int = 224) -> nn.Module:
    """SlowFast R50 8x8 (Feichtenhofer et al. 2019, arXiv 1812.03982): (B, 3, T, H, W) -> logits.

    ``num_frames`` counts the fast pathway's frames; the slow pathway sees a quarter of them. No parameter's
    shape depends on the clip's size. Raises ValueError when ``num_frames`` is no multiple of 4: the
    pathways would not fuse.
    """
    _check("ptv_slowfast_r50", num_classes, num_frames, image_size, multiples=(SLOW_STEP, 1))
    from pytorchvideo.models.hub import slowfast_r50

    side = -(-image_size // TOTAL_STRIDE)  # five padded strides of 2, each of which rounds up
    pools = ((num_frames // SLOW_STEP, side, side), (num_frames, side, side))
    net = slowfast_r50(model_num_class=num_classes, head_pool_kernel_sizes=pools)
    return FixedClip(net, num_frames, image_size, SLOW_STEP)


def _check(
    model: str, num_classes: int, num_frames: int, image_size: int, *, multiples: tuple[int, int] = (1, 1)
) -> None:
    """Raise ValueError without classes, for two image sizes, or for frames or sizes of other multiples."""
    if not num_classes:
        raise ValueError(f"num_classes=0 of {model}: must be 1 or more, as it cannot go without its head")
    if not isinstance(image_size, int):
        raise ValueError(f"image_size={image_size!r} of {model}: must be one number, of square clips")
    sizes = {"num_frames": num_frames, "image_size": image_size}
    for (name, value), divisor in zip(sizes.items(), multiples, strict=True):
        if value % divisor:
            raise ValueError(f"{name}={value} of {model}: must be a multiple of {divisor}")
