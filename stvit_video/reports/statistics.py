"""Whether a difference between scored runs is more than the choice of videos: bootstrap, McNemar, Holm.

All runs are scored on the same N videos, which are taken as a random sample of the videos one cares about.
That training with another seed gives another result is not in any of these figures.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Weights = NDArray  # (R, N): how often each of N videos is in each of R resamples
Figure = Callable[[Weights], NDArray]  # -> (R,)


def resamples(videos: int, count: int, seed: int) -> Iterator[Weights]:
    """`count` bootstrap samples of N videos, as weights (R, N), some at a time: memory is bounded."""
    generator = np.random.default_rng(seed)
    at_once = max(2_000_000 // videos, 1)
    for start in range(0, count, at_once):
        size = min(at_once, count - start)
        drawn = generator.integers(videos, size=(size, videos)) + videos * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * videos).reshape(size, videos)


def bootstrap(figures: Sequence[Figure], videos: int, *, count: int = 10_000, seed: int = 0) -> NDArray:
    """Each figure of each resample (F, count); all see the same resamples, so their values are paired."""
    parts = [[figure(weights) for figure in figures] for weights in resamples(videos, count, seed)]
    return np.concatenate([np.stack(part) for part in parts], axis=1)


def interval(values: NDArray) -> tuple[float, float]:
    """95%, by percentiles."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def accuracy(right: NDArray) -> Figure:
    """right: (N,) whether each video is."""
    return lambda weights: weights @ right / weights.sum(1)


def mean_class_accuracy(right: NDArray, labels: NDArray) -> Figure:
    """labels: (N,) class ids; the mean is over the classes that a resample has."""
    order = np.argsort(labels, kind="stable")
    starts = np.unique(labels[order], return_index=True)[1]

    def figure(weights: Weights) -> NDArray:
        weights = weights[:, order]
        videos = np.add.reduceat(weights, starts, axis=1)
        hits = np.add.reduceat(weights * right[order], starts, axis=1)
        return (hits / np.maximum(videos, 1)).sum(1) / (videos > 0).sum(1)

    return figure


def mean_average_precision(scores: NDArray, labels: NDArray) -> Figure:
    """scores (N, K), labels (N, K) of truth values; the mean is over the classes that a resample has.

    Average precision as in scikit-learn: the sum over the thresholds of precision times the rise in recall.
    """
    classes = [c for c in range(labels.shape[1]) if labels[:, c].any()]

    def figure(weights: Weights) -> NDArray:
        total, counted = np.zeros(len(weights)), np.zeros(len(weights))
        for c in classes:
            order = np.argsort(-scores[:, c], kind="stable")
            ends = np.flatnonzero(np.diff(scores[order, c], append=-np.inf))  # equal scores: one threshold
            drawn = weights[:, order]
            hits = np.cumsum(drawn * labels[order, c], axis=1)[:, ends]
            precision = hits / np.maximum(np.cumsum(drawn, axis=1)[:, ends], 1)
            rise = np.diff(hits, axis=1, prepend=0)
            total += (precision * rise).sum(1) / np.maximum(hits[:, -1], 1)
            counted += hits[:, -1] > 0
        return total / np.maximum(counted, 1)

    return figure


def mcnemar(right_a: NDArray, right_b: NDArray) -> float:
    """p of McNemar's exact test: of the videos that one run alone has right, each has half."""
    from scipy.stats import binomtest  # takes a second to import

    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def two_sided(differences: NDArray) -> float:
    """p of a paired bootstrap: twice the share of resamples on the rarer side of zero."""
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (rarer + 1) / (len(differences) + 1)))


def holm(values: Sequence[float]) -> list[float]:
    """p values of several comparisons, corrected so that all of them hold together (Holm 1979)."""
    corrected, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(np.argsort(values, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = highest
    return corrected
