"""The command bench."""

from collections.abc import Sequence

from ..bench import commands as benchmarks
from .common import command


@command
def bench(args: Sequence[str]) -> None:
    """Measure models, data loading, or accuracy against speed."""
    benchmarks.run(args)
