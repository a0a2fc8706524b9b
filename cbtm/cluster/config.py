"""Settings of the clusterer stage."""

from typing import Literal, Self

from pydantic import Field, model_validator

from cbtm.config import Config


class ClusterConfig(Config):
    """How domains are found.

    Attributes:
        n_clusters: Number of domains, and of experts.
        path: Folder or s3:// prefix of a clusterer that is there already, of another run or imported; nothing is
            fitted then, and only `labels`, `max_documents`, `random_state` and `examples` matter.
        assignments: Folder or s3:// prefix of a given assignment, {"sp_id", "cluster"} lines in files named like the
            corpus files. Training documents keep these clusters; the centres for routing are their means.
        labels: Folder or s3:// prefix of known domains, {"sp_id", "domain"} lines in files named like the corpus
            files. They are only measured against, never trained on.
        balance: What clusters get equally much of while the centres are found. Clusters of equally many documents
            can differ by a factor of three in tokens.
        backend: balanced is ours; sklearn is plain k-means; balanced-kmeans is the PyPI package of that name, whose
            clusters are not balanced in spite of it.
        n_components: Length of a document's vector.
        min_document_frequency: Words in fewer documents than this are not counted.
        max_documents: Documents that k-means looks at; a larger training split is sampled evenly at random.
        vocabulary_documents: Of these, the documents that the words and the projection are learned from. Their texts
            are in memory together; where this is smaller than max_documents, the corpus is read a second time.
        batch_documents: Documents balanced at a time; with more of them, every k-means round goes through all
            batches. Memory grows with this times n_clusters.
        n_init: Independent starts of k-means, of which the best is kept.
        max_iterations: Most rounds of one start.
        device: Where k-means computes: cpu, cuda, or auto for a GPU where there is one.
        random_state: Seed of the sample, the SVD and k-means.
        examples: Most typical, and most borderline, documents that are kept for the report, for each domain.
    """

    n_clusters: int = Field(default=8, ge=1)
    path: str | None = None
    assignments: str | None = None
    labels: str | None = None
    balance: Literal["documents", "tokens"] = "documents"
    backend: Literal["balanced", "sklearn", "balanced-kmeans"] = "balanced"
    n_components: int = Field(default=100, ge=1)
    min_document_frequency: int = Field(default=1, ge=1)
    max_documents: int = Field(default=100_000, ge=1)
    vocabulary_documents: int = Field(default=100_000, ge=1)
    batch_documents: int = Field(default=200_000, ge=1)
    n_init: int = Field(default=1, ge=1)
    max_iterations: int = Field(default=50, ge=1)
    device: str = "auto"
    random_state: int = Field(default=0, ge=0)
    examples: int = Field(default=3, ge=0)

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        for name in ("max_documents", "batch_documents"):
            if self.n_clusters > getattr(self, name):
                raise ValueError(f"n_clusters={self.n_clusters} is larger than {name}={getattr(self, name)}")
        if self.path is not None and self.assignments is not None:
            raise ValueError("path and assignments exclude each other: one gives the centres, the other makes them")
        if self.max_documents > self.batch_documents and self.backend != "balanced":
            raise ValueError(
                f"backend={self.backend!r} takes all documents at once; set max_documents={self.max_documents} to at "
                f"most batch_documents={self.batch_documents}"
            )
        if self.balance == "tokens" and self.backend != "balanced":
            raise ValueError(f"balance='tokens' needs backend='balanced', not {self.backend!r}")
        return self

    @property
    def needs_tokens(self) -> bool:
        """Whether the fit counts tokens."""
        return self.balance == "tokens" and self.path is None and self.assignments is None
