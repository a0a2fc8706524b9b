"""The plan of a run: which corpus files there are, and into which groups the assigner takes them.

Groups are the unit of the first ParallelFor. They are made of whole shards, in sorted order, so that the same
corpus gives the same groups on every machine.
"""

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict

from cbtm import storage
from cbtm.config import digest_of
from cbtm.corpus import CorpusConfig, list_split, shard_of
from cbtm.errors import DataError, ManifestError

Part = Literal["train", "validation"]


class PlannedFile(BaseModel):
    """One corpus file: path relative to the corpus root, bytes, version in its store, and content digest."""

    model_config = ConfigDict(frozen=True)

    path: str
    size: int
    version: str
    digest: str


class ShardGroup(BaseModel):
    """Shards of one split that one assigner takes.

    Attributes:
        name: Name of the group, such as train-00003.
        part: Whether its documents train or validate.
        split: Path of the split below the corpus root.
        files: Its files, sorted by path.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    part: Part
    split: str
    files: tuple[PlannedFile, ...]

    @property
    def digest(self) -> str:
        """Identity of the group's content."""
        return digest_of([[file.path, file.digest] for file in self.files])

    @property
    def paths(self) -> list[str]:
        """Paths of the files relative to the corpus root."""
        return [file.path for file in self.files]


class Plan(BaseModel):
    """All groups of a run, and the corpus root that their paths are relative to."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    corpus_root: str = ""
    groups: tuple[ShardGroup, ...]

    def part(self, part: Part) -> list[ShardGroup]:
        """Groups that train, or that validate."""
        return [group for group in self.groups if group.part == part]

    def group(self, name: str) -> ShardGroup:
        """The group of that name.

        Raises:
            ManifestError: If the plan has none.
        """
        if (group := self._by_name.get(name)) is not None:
            return group
        raise ManifestError(f"the plan has no shard group {name!r}; it has {', '.join(g.name for g in self.groups)}")

    def digest(self, part: Part) -> str:
        """Identity of the text of one part."""
        return self._digests[part]

    @cached_property
    def _by_name(self) -> dict[str, ShardGroup]:
        return {group.name: group for group in self.groups}

    @cached_property
    def _digests(self) -> dict[Part, str]:
        # By file, not by group: how the work is divided changes nothing that is made of the whole.
        parts: tuple[Part, ...] = ("train", "validation")
        return {
            part: digest_of([[file.path, file.digest] for group in self.part(part) for file in group.files])
            for part in parts
        }


def make_plan(corpus: CorpusConfig, *, max_groups: int, previous: Plan | None = None) -> Plan:
    """List the corpus and group its shards.

    Args:
        corpus: Where it lies.
        max_groups: Most groups of one split.
        previous: An earlier plan; files of the same corpus root, size and time are not hashed again.

    Raises:
        DataError: If a split is empty, or both splits are the same or one holds the other.
    """
    train, validation = corpus.train_split, corpus.validation_split
    if f"{train}/".startswith(f"{validation}/") or f"{validation}/".startswith(f"{train}/"):
        raise DataError(
            f"corpus.train_split={train!r} and corpus.validation_split={validation!r} share text: a perplexity on "
            "training text says nothing; hold documents out first (cbtm corpus import FOLDER OUTPUT)"
        )
    known = {
        (file.path, file.size, file.version): file.digest
        for group in (previous.groups if previous and previous.corpus_root == corpus.root else ())
        for file in group.files
    }
    groups = [
        *_groups(corpus, "train", train, max_groups, known),
        *_groups(corpus, "validation", validation, max_groups, known),
    ]
    return Plan(corpus_root=corpus.root, groups=tuple(groups))


def _groups(
    corpus: CorpusConfig, part: Part, split: str, max_groups: int, known: dict[tuple[str, int, str], str]
) -> list[ShardGroup]:
    files = [
        PlannedFile(
            path=file.path,
            size=file.size,
            version=file.version,
            digest=known.get((file.path, file.size, file.version)) or _content_digest(corpus.root, file),
        )
        for file in list_split(corpus.root, split)
    ]
    shards = [list(shard) for _, shard in itertools.groupby(files, key=lambda file: shard_of(file.path, split))]
    return [
        ShardGroup(name=f"{part}-{number:05d}", part=part, split=split, files=tuple(itertools.chain(*some)))
        for number, some in enumerate(_evenly(shards, max_groups))
    ]


def _content_digest(root: str, file: storage.StoredFile) -> str:
    # An ETag changes with the content; hashing a bucket's terabytes would cost more than the run.
    return file.version if storage.is_s3(root) else storage.sha256(storage.join(root, file.path))


def _evenly(shards: Sequence[list[PlannedFile]], max_groups: int) -> list[list[list[PlannedFile]]]:
    count = min(max_groups, len(shards))
    bounds = [len(shards) * number // count for number in range(count + 1)]
    return [list(shards[start:end]) for start, end in itertools.pairwise(bounds)]
