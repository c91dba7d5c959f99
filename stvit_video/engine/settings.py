"""Settings of the training loop; apart from it, as what it imports takes seconds."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ..bounds import Count, Range

NotNegative = Annotated[float, Range(0)]
Schedule = Literal["cosine", "poly", "steps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
MatmulPrecision = Literal["highest", "high", "medium"]
Parallel = Literal["ddp", "fsdp2"]


@dataclass
class LoopConfig:
    """Training: AdamW, a warm-up, and a rate that falls."""

    epochs: Count = 30
    """Passes over the training list."""
    batch_size: Count = 8
    """Videos of a rank in one forward pass (data.repeats clips each)."""
    accumulate: Count = 1
    """Forward passes in one update."""
    lr: NotNegative = 5e-4
    """Peak learning rate for lr_per videos an update; scaled linearly to the real number."""
    lr_per: Count = 256
    """Videos an update that lr, warmup_lr and min_lr are meant for."""
    warmup_epochs: NotNegative = 5.0
    """Linear warm-up; a tenth of the run where the run is no longer than that."""
    warmup_lr: NotNegative = 1e-6
    """Where the warm-up starts."""
    min_lr: NotNegative = 1e-6
    """Where the rate ends."""
    schedule: Schedule = "cosine"
    """How lr falls after the warm-up: cosine, poly (linear to the power 0.9), steps."""
    steps: tuple[Count, ...] = ()
    """Epochs after which "steps" takes a tenth of the rate."""
    head_lr: NotNegative = 1.0
    """Factor on the learning rate of the head."""
    betas: tuple[Annotated[float, Range(0, 0.999999)], Annotated[float, Range(0, 0.999999)]] = (0.9, 0.999)
    """AdamW's averages."""
    weight_decay: NotNegative = 0.05
    """AdamW's; not on biases, norms, position tables and G."""
    layer_decay: Annotated[float, Range(0.01, 1)] | None = None
    """Learning rate falls by this factor from layer to layer, downwards; null: none."""
    clip_grad: Annotated[float, Range(1e-9)] | None = None
    """Largest norm of the gradient; null: any."""
    ema: Annotated[float, Range(0, 0.999999)] | None = None
    """Decay of the averaged weights, which are then the ones validated and scored; null: none."""
    ema_warmup: bool = True
    """Let the averages' decay rise to `ema`, to 0.9992 in 47,000 updates; false: `ema` from the start."""
    precision: Precision = "auto"
    """Arithmetic of the model; auto: fp32 on the CPU, bf16 on CUDA where it is native, else fp16."""
    matmul: MatmulPrecision = "high"
    """Precision of float32 matrix products on CUDA (torch.set_float32_matmul_precision); high: TF32."""
    compile: bool = False
    """torch.compile the model for training: minutes at the start, faster updates on CUDA."""
    max_nonfinite: Count = 10
    """Updates in a row with a loss or gradient that is not finite, all skipped, before the run stops;
    with fp16 16 more, in which the scale of the loss may fall."""
    eval_every: Count = 1
    """Epochs between validations."""
    log_every: Count = 10
    """Updates between log entries."""
    budgets: tuple[Count, ...] = ()
    """Superpatches: tokens of a clip, one of these drawn for each update; none: model.superpatch_tokens."""
    budget_epochs: NotNegative | None = None
    """The budgets in turn, in equal shares of so many epochs, then the model's; null: drawn at random."""
    freeze: Literal["backbone"] | Count | None = None
    """Not trained: backbone (all but norm and head: a linear probe), or embedding and first N layers."""
    keep_every: Count | None = None
    """Epochs between checkpoints that stay, as epoch-0010.pt; null: none."""
    checkpoint_minutes: NotNegative | None = 15.0
    """Minutes between checkpoints within an epoch; null: only where one ends."""
    parallel: Parallel = "ddp"
    """Several processes: a model each (ddp), or one model in shares (fsdp2: less memory, more traffic)."""

    def warmup(self) -> float:
        """Epochs of warm-up: a tenth of a run that is no longer than `warmup_epochs`."""
        return self.warmup_epochs if self.warmup_epochs < self.epochs else self.epochs / 10
