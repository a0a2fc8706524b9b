"""One model from many: averages of the experts' parameters, which cost what a single expert costs to run.

Experts that branch from one seed model stay near enough to each other for the mean of their parameters to be a model
(Wortsman et al. 2022, "Model soups", arXiv 2203.05482; Li et al. 2022, Branch-Train-Merge, arXiv 2208.03306, section
2.3, weighs by a prior over domains). Three recipes: the plain mean, the mean by a prior, and the greedy soup, which
takes experts in the order of their own loss and keeps each that lowers the soup's.

Tensors are read one at a time from all experts and added up in float64, so memory is that of one model, however many
are averaged.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from cbtm.branch.seed import model_files, save_weights
from cbtm.branch.tokenizer import TOKENIZER_FILES
from cbtm.config import Config, digest_of
from cbtm.errors import ConfigError, DataError

Recipe = Literal["uniform", "weighted", "greedy"]
_BESIDE_WEIGHTS = ("config.json", "generation_config.json", *TOKENIZER_FILES)


class AverageConfig(Config):
    """Which averages of the experts' parameters are made and evaluated beside the ensembles.

    Attributes:
        averages: uniform is the plain mean; weighted the mean by how much weight each expert's domain has on average in
            the validation documents that settings are chosen on; greedy the soup that takes the best expert on those
            documents and adds each next one if that helps.
        temperature: Temperature of the routing weights that weighted takes the mean of.
        distance_power: Exponent of the distance in them.
    """

    averages: tuple[Recipe, ...] = ()
    temperature: float = Field(default=0.1, gt=0)
    distance_power: float = Field(default=2, gt=0)

    @field_validator("averages")
    @classmethod
    def _recipes_once(cls, averages: tuple[Recipe, ...]) -> tuple[Recipe, ...]:
        if len(set(averages)) < len(averages):
            raise ValueError(f"averages are {list(averages)}, one of them twice")
        return averages

    def weighting_digest(self) -> str:
        """Digest of what the weights of the weighted average depend on."""
        return digest_of([self.temperature, self.distance_power])


def average_models(folders: Sequence[Path], weights: Sequence[float], output: Path) -> None:
    """Write the weighted mean of models as a plain Hugging Face folder.

    A model of weight 0 is not opened. Configuration and tokenizer are those of the first of the others. Tensors of
    whole numbers, such as position ids, must be the same in all of them.

    Args:
        folders: Hugging Face folders with safetensors, of one architecture.
        weights: Weight of each, at least 0, with a sum above 0; they are divided by their sum.
        output: Folder to write, which is there.

    Raises:
        ConfigError: If there is no model, a folder holds none, or weights are no such numbers.
        DataError: If models have tensors of other names or shapes, or a mean is not finite.
    """
    shares = _shares(weights, len(folders))
    used = [(_Tensors(folder), share) for folder, share in zip(folders, shares, strict=True) if share > 0]
    first = used[0][0]
    for other, _ in used[1:]:
        first.check_same(other)
    for name in _BESIDE_WEIGHTS:
        if (first.folder / name).exists():
            shutil.copyfile(first.folder / name, output / name)
    save_weights({name: _mean(name, used) for name in first.names}, output)


def greedy_soup(
    folders: Mapping[int, Path],
    order: Sequence[int],
    evaluate: Callable[[Path], float],
    output: Path,
    scratch: Path,
) -> dict[str, Any]:
    """Average models one by one, keeping each that does not make the average worse.

    Args:
        folders: Hugging Face folder of each expert, by cluster.
        order: Clusters, the best expert by itself first.
        evaluate: Loss of a model, by its folder; lower is better. Called once for each expert.
        output: Folder to write the soup to, which is there.
        scratch: Folder for candidates; it is made, also where one that was killed has left it, and removed.

    Returns:
        `chosen`: clusters of the experts in the soup, in the order in which they came; `tried`: for each expert in
        `order` its cluster, the loss of the soup with it, and whether it was kept.

    Raises:
        ConfigError: If `order` is empty.
        DataError: As `average_models`.
    """
    if not order:
        raise ConfigError("no expert to make a soup of; train at least one")
    chosen: list[int] = []
    tried: list[dict[str, Any]] = []
    best = math.inf
    for cluster in order:
        candidate = [*chosen, cluster]
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        average_models([folders[one] for one in candidate], [1.0] * len(candidate), scratch)
        loss = evaluate(scratch)
        shutil.rmtree(scratch)
        kept = loss <= best  # as the first always is
        if kept:
            chosen, best = candidate, loss
        tried.append({"cluster": cluster, "negative_log_prob": loss if math.isfinite(loss) else None, "kept": kept})
    average_models([folders[one] for one in chosen], [1.0] * len(chosen), output)
    return {"chosen": chosen, "tried": tried}


def _shares(weights: Sequence[float], n_models: int) -> list[float]:
    if n_models == 0:
        raise ConfigError("no model to average; give at least one")
    if len(weights) != n_models:
        raise ConfigError(f"{len(weights)} weights for {n_models} models; give one for each")
    total = sum(weights)
    if not (math.isfinite(total) and total > 0 and min(weights) >= 0):
        raise ConfigError(f"weights {list(weights)} are not numbers of at least 0 with a finite sum above 0")
    return [weight / total for weight in weights]


class _Tensors:
    """The tensors of a model's folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        names = model_files([path.name for path in folder.iterdir()], str(folder))
        opened: Any = safe_open  # untyped
        files = [opened(folder / name, framework="pt") for name in names if name.endswith(".safetensors")]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - it is no mapping

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    def read(self, name: str) -> Any:
        return self._files[name].get_tensor(name)

    def shape(self, name: str) -> list[int]:
        return list(self._files[name].get_slice(name).get_shape())

    def check_same(self, other: "_Tensors") -> None:
        if lonely := sorted(set(self.names) ^ set(other.names)):
            raise DataError(
                f"{lonely[0]} is in one of {self.folder} and {other.folder} alone: models of different architectures "
                "have no average"
            )
        for name in self.names:
            if self.shape(name) != other.shape(name):
                raise DataError(
                    f"{name} has shape {self.shape(name)} in {self.folder} and {other.shape(name)} in {other.folder}: "
                    "models of different sizes have no average"
                )


def _mean(name: str, used: Sequence[tuple[_Tensors, float]]) -> Any:
    """Weighted mean of one tensor over the models, in the type that it has in the first."""
    import torch

    first = used[0][0].read(name)
    if not first.is_floating_point():
        for other, _ in used[1:]:
            if not torch.equal(first, other.read(name)):
                raise DataError(f"{name} holds whole numbers that differ between the models: they have no average")
        return first
    total = torch.zeros(first.shape, dtype=torch.float64)
    for model, share in used:
        total += share * model.read(name).double()
    mean = total.to(first.dtype)
    if not torch.isfinite(mean).all():
        raise DataError(f"{name} is not finite in the average: the weights of one of the models are broken")
    return mean
