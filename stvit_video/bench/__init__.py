"""The benchmarks of `stvit-bench`. This file imports nothing: a GPU machine has torch and little else."""

MODES = ("forward", "training")  # what is timed of a model
