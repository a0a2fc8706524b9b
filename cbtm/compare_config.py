"""Settings of a comparison of several runs."""

from typing import Any

from pydantic import Field, field_validator

from cbtm.config import Config


class CompareConfig(Config):
    """What `cbtm compare` compares; a single run takes no notice of it.

    Attributes:
        n_clusters: Numbers of clusters, each with balanced clusters and with random ones.
        random_states: Every arm is made once for each; it is added to the random states of clusters, random clusters
            and training. Seed model and held-out documents are the same for all.
        random_clusters: Whether experts on random clusters are trained for each number of clusters.
        plain: Numbers of clusters for k-means without balance (scikit-learn's); None is the largest.
        by_tokens: Numbers of clusters for clusters of equally many tokens; None is the largest.
        small_batch: Numbers of experts for a dense model that has the batch of one of so many, and so many times the
            steps; None is the largest.
        scaled_learning_rate: Whether the same is trained once more with a learning rate for its batch: that of the
            others over the square root of the number of experts, the rule of Adam for batches.
    """

    n_clusters: tuple[int, ...] = Field(default=(2, 4, 8), min_length=1)
    random_states: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    random_clusters: bool = True
    plain: tuple[int, ...] | None = None
    by_tokens: tuple[int, ...] | None = None
    small_batch: tuple[int, ...] | None = None
    scaled_learning_rate: bool = True

    @field_validator("n_clusters", "plain", "by_tokens", "small_batch", "random_states")
    @classmethod
    def _each_once(cls, values: tuple[int, ...] | None, info: Any) -> tuple[int, ...] | None:
        least = 0 if info.field_name == "random_states" else 2
        if values is not None and (len(set(values)) < len(values) or any(value < least for value in values)):
            raise ValueError(f"expected numbers from {least} on, each once, got {list(values)}")
        return values

    def controls(self, given: tuple[int, ...] | None) -> tuple[int, ...]:
        """Numbers of clusters of one kind of control: those that are given, or the largest."""
        return (max(self.n_clusters),) if given is None else given
