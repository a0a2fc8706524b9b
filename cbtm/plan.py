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
        corpus_root: Root that the paths are relative to, where that is not the plan's: text that another run has
            validated on, and that a run which extends it goes on with.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    part: Part
    split: str
    files: tuple[PlannedFile, ...]
    corpus_root: str | None = None

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
        if group.corpus_root is None
        for file in group.files
    }
    groups = [
        *_groups(corpus, "train", train, max_groups, known),
        *_groups(corpus, "validation", validation, max_groups, known),
    ]
    return Plan(corpus_root=corpus.root, groups=tuple(groups))


def extended_plan(own: Plan, base: Plan) -> Plan:
    """The plan of a run that extends another: its own text, and behind the other's validation text its own.

    Args:
        own: Plan of the text that is added.
        base: Plan of the run that is extended. Of its text only the validation split is read again.

    Raises:
        DataError: If a file of the added text has the path of one that the other run validated on, a text is trained
            on here and validated on there or the other way round, or the other run's validation text has changed.
    """
    inherited = [
        group.model_copy(update={"corpus_root": group.corpus_root or base.corpus_root})
        for group in base.part("validation")
    ]
    _check_texts(own, base)
    for group in inherited:
        _check_unchanged(group)
    validation = [
        group.model_copy(update={"name": f"validation-{number:05d}"})
        for number, group in enumerate([*inherited, *own.part("validation")])
    ]
    return own.model_copy(update={"groups": (*own.part("train"), *validation)})


def _check_texts(own: Plan, base: Plan) -> None:
    """One document has one name, and none is trained on and validated on."""
    taken = {file.path for group in base.part("validation") for file in group.files}
    for group in own.groups:
        for file in group.files:
            if file.path in taken:
                raise DataError(
                    f"{storage.join(own.corpus_root, file.path)} has the same path as a file that the extended run "
                    "validates on: their documents would have one name; give the added text's files or shards other "
                    "names (cbtm corpus import --name NAME)"
                )
    roles = {"train": "training", "validation": "validation"}
    for part, other in (("train", "validation"), ("validation", "train")):
        seen = {file.digest: file.path for group in base.groups if group.part == other for file in group.files}
        for file in (file for group in own.groups if group.part == part for file in group.files):
            if file.digest in seen:
                raise DataError(
                    f"{storage.join(own.corpus_root, file.path)} is {roles[part]} text here and has the content of "
                    f"{seen[file.digest]}, {roles[other]} text of the extended run; take it out of one of them"
                )


def _check_unchanged(group: ShardGroup) -> None:
    root = group.corpus_root
    assert root is not None
    there = {file.path: file for file in list_split(root, group.split)}
    for file in group.files:
        found = there.get(file.path)
        if found is not None and (found.size, found.version) == (file.size, file.version):
            continue
        if found is None or _content_digest(root, found) != file.digest:
            raise DataError(
                f"{storage.join(root, file.path)}, which the extended run validated on, "
                f"{'is not there any more' if found is None else 'has changed since'}; put it back, or run the "
                "extended run again on the text as it is"
            )


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
