"""What stands on a backbone: the base of all models that do more than name a clip's class."""

from torch import nn


class WithHead(nn.Module):
    """A backbone (`grids`, no classes) and a `head` on its grids; subclasses say what the head is.

    All that the head learns is named `head.*`: it starts fresh, and may have a learning rate of its own.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def no_weight_decay(self) -> set[str]:
        """The backbone's (timm's protocol)."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict:
        """The backbone's layers, and the head with what the backbone has for one (timm's protocol)."""

        def inside(pattern: str) -> str:
            return rf"^backbone\.{pattern.removeprefix('^')}"

        groups = self.backbone.group_matcher(coarse)
        return {
            "stem": inside(groups["stem"]),
            "blocks": [(inside(pattern), order) for pattern, order in groups["blocks"]],
            "head": rf"{inside(groups['head'])}|^head\.",
        }
