"""Settings of training; free of torch, so that a configuration can be checked where torch is not installed."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cbtm.branch.seed import ScratchModelConfig
from cbtm.config import Config, digest_of
from cbtm.errors import ConfigError


class OptimizationConfig(Config):
    """How one model is trained.

    Attributes:
        steps: Optimiser steps.
        sequences_per_step: Sequences in one step of the dense model; k experts take 1/k of it each.
        context_length: Tokens in a sequence.
        micro_batch_size: Sequences in one forward pass; None takes the whole batch at once. Gradients accumulate.
        learning_rate: Peak of the schedule.
        warmup_steps: Steps of linear warm-up.
        final_learning_rate_ratio: Learning rate of the last step over the peak.
        decay_power: Power of the polynomial decay after the warm-up; 1 is linear.
        adam_betas: Decay rates of AdamW's moments.
        adam_epsilon: Term added to AdamW's denominator.
        weight_decay: Decoupled weight decay, on matrices only.
        gradient_clip_norm: Largest norm of the whole gradient.
        precision: Type that the model computes in; weights, gradients and moments stay in float32. float16 scales the
            loss, and leaves out a step whose gradient overflows.
        loss_scale: Loss scale that float16 starts from.
        activation_checkpointing: Compute activations again in the backward pass instead of keeping them.
        compile: Compile the model with torch.compile, which needs a C compiler and a minute before the first step.
        random_state: Seed of the data order and of dropout.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between points of the training curve.
        threads: CPU threads; None takes PyTorch's default. Results are equal to the bit for equal counts only.
        device: Where to train; auto takes a GPU where there is one.
        price_per_hour: Price of an hour of the device, for the cost of each model in the report.
    """

    steps: int = Field(ge=1)
    sequences_per_step: int = Field(ge=1)
    context_length: int = Field(default=2048, ge=2)
    micro_batch_size: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    warmup_steps: int = Field(default=0, ge=0)
    final_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    decay_power: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    adam_epsilon: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clip_norm: float = Field(default=1.0, gt=0)
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    loss_scale: float = Field(default=128.0, gt=0, allow_inf_nan=False)
    activation_checkpointing: bool = False
    compile: bool = False
    random_state: int = Field(default=1234, ge=0)
    checkpoint_every: int = Field(default=200, ge=1)
    log_every: int = Field(default=20, ge=1)
    threads: int | None = Field(default=None, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    price_per_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _warm_up_ends(self) -> "OptimizationConfig":
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be smaller than steps={self.steps}")
        return self

    def result_digest(self) -> str:
        """Digest of what the trained weights depend on: neither how often progress is saved or logged nor
        the price is a part of it."""
        return digest_of(self.model_dump(mode="json", exclude={"checkpoint_every", "log_every", "price_per_hour"}))

    @property
    def total_tokens(self) -> int:
        """Tokens that the dense model, or all experts together, are trained on."""
        return self.steps * self.sequences_per_step * self.context_length


class TrainConfig(OptimizationConfig):
    """How experts, dense baseline and random-cluster control are trained: one budget, shared alike.

    Attributes:
        dense: Train the dense baseline.
        random_clusters: Train an expert for each random cluster; needs assign.random_clusters.
    """

    steps: int = Field(default=10_000, ge=1)
    sequences_per_step: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0, allow_inf_nan=False)
    dense: bool = True
    random_clusters: bool = True

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> Self:
        if self.micro_batch_size is not None and self.micro_batch_size > self.sequences_per_step:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} is larger than sequences_per_step={self.sequences_per_step}"
            )
        return self

    def optimization(self) -> OptimizationConfig:
        """The part that every member shares, without what says which members there are."""
        return OptimizationConfig(**self.model_dump(exclude={"dense", "random_clusters"}))

    def share(self, n_clusters: int) -> int:
        """Sequences of one expert in one step.

        Raises:
            ConfigError: If the batch does not divide among the clusters.
        """
        if self.sequences_per_step % n_clusters:
            below = self.sequences_per_step // n_clusters * n_clusters
            raise ConfigError(
                f"train.sequences_per_step={self.sequences_per_step} does not divide among "
                f"cluster.n_clusters={n_clusters}; use {below + n_clusters}" + (f" or {below}" if below else "")
            )
        return self.sequences_per_step // n_clusters


class SeedConfig(Config):
    """Where the seed model comes from: a folder, or training from scratch.

    Attributes:
        path: Hugging Face folder (local or s3://) of a causal language model with safetensors weights.
        scratch: Shape of a model that is trained from scratch instead.
        training: How it is trained, on the whole training split.
    """

    path: str | None = None
    scratch: ScratchModelConfig | None = None
    training: OptimizationConfig | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.scratch is None):
            raise ValueError("give either path (a Hugging Face folder) or scratch and training")
        if (self.scratch is None) != (self.training is None):
            raise ValueError("scratch and training go together: the shape of the model and how it is trained")
        return self
