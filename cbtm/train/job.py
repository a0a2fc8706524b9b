"""One training as a file: all that a process needs to train one member of a run, wherever it is started.

A stage prepares it (data fetched, start model on disk) and either trains in its own process or has several started,
one for each device, which read it again. Small things only: models, tokens and checkpoints go by path or URI.
"""

from pathlib import Path
from typing import Any

from cbtm.config import Config
from cbtm.errors import ManifestError
from cbtm.tokens import TokenDocuments
from cbtm.train.config import OptimizationConfig
from cbtm.train.member import Member

EXPERT_FILE, CURVE_FILE = "expert.json", "training.jsonl"
"""In a trained model's folder: what it is bound to, and its training curve."""

Shard = tuple[Path, str]  # folder and stem of a token shard
Shards = tuple[Shard, ...]


class ValidationData(Config):
    """Validation documents that a training is measured on while it runs.

    Attributes:
        shards: Folder and stem of each of their token shards, on this machine.
        clusters: File (.npy) with the nearest cluster of each document, int64.
        used: File (.npy) with a boolean for each document: those that results are reported on are left out.
    """

    shards: Shards
    clusters: Path
    used: Path


class TrainJob(Config):
    """The training of one member.

    Attributes:
        member: Its name.
        start: Hugging Face folder of the model that it starts from.
        tokenizer: Folder of the run's tokenizer.
        shards: Folder and stem of each token shard of its training documents, on this machine.
        validation: What it is validated on meanwhile, where that was asked for.
        config: Optimisation settings; `steps` are its own.
        sequences_per_step: Its sequences in one step, over all devices.
        cluster_tokens: Tokens that the vocabulary grows by, one for each cluster; None without cluster tokens.
        bindings: Digests of what it is bound to (clusterer, tokenizer, seed), for expert.json.
        checkpoints: Folder or s3:// prefix of its checkpoints.
        key: Identity of the training: checkpoints of another are never resumed from.
        scratch: Folder for its own use, on this machine.
        output: Folder that receives the trained model.
    """

    member: str
    start: Path
    tokenizer: Path
    shards: Shards
    validation: ValidationData | None = None
    config: OptimizationConfig
    sequences_per_step: int
    cluster_tokens: int | None = None
    bindings: dict[str, Any]
    checkpoints: str
    key: str
    scratch: Path
    output: Path

    def documents(self) -> TokenDocuments:
        """The member's token stream."""
        return TokenDocuments(list(self.shards))

    @property
    def cluster(self) -> int | None:
        """The member's cluster, None for seed and dense."""
        return Member.parse(self.member).cluster

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(self.model_dump_json(indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "TrainJob":
        """Read what `save` wrote.

        Raises:
            ManifestError: If it cannot be read.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ManifestError(f"{path} is no training job: {error}") from error
