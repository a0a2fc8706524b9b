"""Settings of training; free of torch, so that a configuration can be checked where torch is not installed."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from cbtm.branch.seed import ScratchModelConfig
from cbtm.config import Config, digest_of
from cbtm.errors import ConfigError
from cbtm.train.node import NodeConfig
from cbtm.train.packing import Packing

# What a training may be resumed with differently.
_BESIDE_THE_RESULT = (
    "checkpoint_every",
    "checkpoints_kept",
    "log_every",
    "validate_every",
    "validation_sequences",
    "price_per_hour",
    "devices",
    "nodes",
    "node",
    "sharding",
)


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
        packing: How documents become blocks: continuous cuts the stream anywhere, documents packs whole ones and pads,
            separate does so and keeps attention inside each document.
        dropout: Dropout on attention weights and on the output of attention and feed-forward layers, as far as the
            architecture has them; None keeps the start model's own.
        random_state: Seed of the data order and of dropout.
        checkpoint_every: Steps between checkpoints.
        checkpoints_kept: Complete checkpoints that stay while training goes on.
        log_every: Steps between points of the training curve.
        validate_every: Steps between validations on the model's own domain and on all; None leaves them out.
        validation_sequences: Most sequences of each of the two validations.
        patience: Validations without a better loss on the own domain after which training ends, and the model of the
            best one is kept; None takes all steps.
        devices: Devices (GPUs, or processes on a CPU) of each machine that train one model together.
        nodes: Machines that train one model together. More than one are the pods of a TrainJob of Kubeflow Trainer.
        node: What each of these machines is.
        sharding: How the model is spread over them: ddp replicates it, fsdp2 and fairscale (GPUs only) shard weights,
            gradients and moments; auto is none for one device and ddp for several.
        threads: CPU threads; None takes PyTorch's default. Results are equal to the bit for equal counts only.
        device: Where to train; auto takes a GPU where there is one.
        price_per_hour: Price of an hour of one device, for the cost of each model in the report.
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
    packing: Packing = "continuous"
    dropout: float | None = Field(default=None, ge=0, lt=1)
    random_state: int = Field(default=1234, ge=0)
    checkpoint_every: int = Field(default=200, ge=1)
    checkpoints_kept: int = Field(default=2, ge=1)
    log_every: int = Field(default=20, ge=1)
    validate_every: int | None = Field(default=None, ge=1)
    validation_sequences: int = Field(default=64, ge=1)
    patience: int | None = Field(default=None, ge=1)
    devices: int = Field(default=1, ge=1)
    nodes: int = Field(default=1, ge=1)
    node: NodeConfig = NodeConfig()
    sharding: Literal["auto", "none", "ddp", "fsdp2", "fairscale"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    price_per_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _warm_up_ends(self) -> "OptimizationConfig":
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be smaller than steps={self.steps}")
        return self

    @model_validator(mode="after")
    def _devices_share_the_work(self) -> Self:
        if self.sharding == "none" and self.nodes * self.devices > 1:
            several = f"devices={self.devices}" + (f" on each of nodes={self.nodes}" if self.nodes > 1 else "")
            raise ValueError(f"sharding=none is for one device, not for {several}; use ddp or fsdp2")
        if self.patience is not None and self.validate_every is None:
            raise ValueError(f"patience={self.patience} counts validations; set validate_every as well")
        if self.validate_every is not None and self.validate_every > self.steps:
            raise ValueError(f"validate_every={self.validate_every} is larger than steps={self.steps}")
        return self

    def result_digest(self) -> str:
        """Digest of what the trained weights depend on.

        Neither how often progress is saved, logged or (without patience) validated is a part of it, nor the price, nor
        on how many devices: a training goes on from its checkpoints on any number of them.
        """
        beside = set(_BESIDE_THE_RESULT)
        if self.patience is not None:
            beside -= {"validate_every", "validation_sequences"}
        return digest_of(self.model_dump(mode="json", exclude=beside))

    @property
    def total_tokens(self) -> int:
        """Tokens that the dense model, or all experts together, are trained on."""
        return self.steps * self.sequences_per_step * self.context_length


class TrainConfig(OptimizationConfig):
    """How experts, dense baseline and random-cluster control are trained: one budget, shared alike.

    Attributes:
        steps_by: equal gives every expert as many steps as the dense model; tokens gives each a number of them in
            proportion to its cluster's tokens, so that all of the text is seen as often, at the same budget in all.
        cluster_token: Put a token of its own in front of each block of an expert, in training and in scoring.
        dense: Train the dense baseline.
        random_clusters: Train an expert for each random cluster; needs assign.random_clusters.
        clusters: The clusters whose experts (and random experts) are trained, each with its usual share of the batch;
            None takes all.
    """

    steps: int = Field(default=10_000, ge=1)
    sequences_per_step: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0, allow_inf_nan=False)
    steps_by: Literal["equal", "tokens"] = "equal"
    cluster_token: bool = False
    dense: bool = True
    random_clusters: bool = True
    clusters: tuple[Annotated[int, Field(ge=0)], ...] | None = None

    @model_validator(mode="after")
    def _micro_batch_fits(self) -> Self:
        if self.micro_batch_size is not None and self.micro_batch_size > self.sequences_per_step:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} is larger than sequences_per_step={self.sequences_per_step}"
            )
        return self

    @field_validator("clusters")
    @classmethod
    def _clusters_are_a_set(cls, clusters: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if clusters is None:
            return None
        if not clusters:
            raise ValueError("names no cluster; leave it out to train the experts of all")
        twice = sorted({cluster for cluster in clusters if clusters.count(cluster) > 1})
        if twice:
            raise ValueError(f"{list(clusters)} names cluster {twice[0]} more than once")
        return tuple(sorted(clusters))

    def trained_clusters(self, n_clusters: int) -> tuple[int, ...]:
        """The clusters whose experts are trained, in ascending order.

        Raises:
            ConfigError: If `clusters` names one that there is not.
        """
        if self.clusters is None:
            return tuple(range(n_clusters))
        unknown = [cluster for cluster in self.clusters if cluster >= n_clusters]
        if unknown:
            raise ConfigError(
                f"train.clusters names cluster {unknown[0]}; with cluster.n_clusters={n_clusters} they are 0 to "
                f"{n_clusters - 1}"
            )
        return self.clusters

    def optimization(self) -> OptimizationConfig:
        """The part that every member shares, without what says which members there are."""
        return OptimizationConfig(**self.model_dump(include=set(OptimizationConfig.model_fields)))

    def in_proportion(self, tokens: Sequence[int], cluster: int) -> OptimizationConfig:
        """Settings of one expert where steps are in proportion to tokens; all experts together take k x `steps`.

        Args:
            tokens: Tokens of each of the k clusters.
            cluster: The expert's.

        Raises:
            ConfigError: If its tokens are worth less than one step.
        """
        total, budget = sum(tokens), self.steps * len(tokens)
        ends = [budget * sum(tokens[:end]) // total for end in (cluster, cluster + 1)]
        steps = ends[1] - ends[0]
        if steps < 1:
            raise ConfigError(
                f"cluster {cluster} has {tokens[cluster]} of {total} tokens, which is less than one of the {budget} "
                "steps that all experts take together; raise train.steps, use fewer clusters or steps_by=equal"
            )
        warmup = min(self.warmup_steps * steps // self.steps, steps - 1)
        shared = self.optimization()
        validate = shared.validate_every and min(shared.validate_every, steps)
        return shared.model_copy(update={"steps": steps, "warmup_steps": warmup, "validate_every": validate})

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
    """Where the seed model comes from: a given one, or training from scratch.

    Attributes:
        path: A causal language model with safetensors weights: a Hugging Face folder (local or s3://), or a name on
            the Hugging Face hub, `org/name` or `org/name@revision`, with `hf://` in front where such a folder is here
            or the name has no organisation.
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
