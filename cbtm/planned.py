"""What a run is before it has made anything: a configuration, a place, a plan of its text, and what it goes on from.

A run that extends another takes over what that one made, where it lies: the other's files are read by their manifests,
as the other run would read them, and nothing below its root is ever written.
"""

import json
from functools import cached_property
from typing import Self

from pydantic import ValidationError

from cbtm import storage
from cbtm.branch.source import is_hub_name, pinned
from cbtm.corpus import CorpusConfig
from cbtm.errors import ManifestError
from cbtm.plan import Plan, ShardGroup, extended_plan, make_plan
from cbtm.run_config import RunConfig, parse_config, recorded_config
from cbtm.train.member import Member

SOURCES_FILE = "sources.json"


class PlannedRun:
    """Configuration, place and plan of one run.

    Args:
        config: A checked configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @classmethod
    def parse(cls, text: str) -> Self:
        """Run of a configuration given as YAML or JSON text."""
        return cls(parse_config(text))

    def uri(self, *parts: str) -> str:
        """URI below the run's root."""
        return storage.join(self.config.root, *parts)

    # --- the run that is extended ---

    @cached_property
    def base(self) -> Self | None:
        """The run that this one adds a domain to, as it was last planned; None for a run of its own.

        Raises:
            StorageError: If there is none.
        """
        extends = self.config.extends
        if extends is None:
            return None
        # Where it lies now: it may have been copied since it wrote down where it lay.
        return type(self)(recorded_config(extends).model_copy(update={"root": extends}))

    def taken_over(self, member: Member) -> bool:
        """Whether a member is the extended run's: seed, dense, and the experts of the clusters that were there."""
        if self.base is None:
            return False
        there = member.cluster is None or member.cluster < self.base.config.cluster.n_clusters
        return member.kind in ("seed", "dense", "expert") and there

    def corpus_of(self, group: ShardGroup) -> CorpusConfig:
        """Where the text of a shard group lies."""
        if group.corpus_root is None:
            return self.config.corpus
        return self.config.corpus.model_copy(update={"root": group.corpus_root})

    # --- plan ---

    @cached_property
    def plan_made(self) -> Plan:
        """The plan, as `plan` wrote it.

        Raises:
            ManifestError: If the run has not been planned.
        """
        plan = self._read_plan()
        if plan is None:
            raise ManifestError(f"{self.uri('plan.json')} is not there: run cbtm plan, or the whole run, first")
        return plan

    def make_plan(self) -> Plan:
        """List the corpus and write plan.json, if it changed."""
        previous = self._read_plan()
        plan = make_plan(self.config.corpus, max_groups=self.config.assign.max_groups, previous=previous)
        if self.base is not None:
            plan = extended_plan(plan, self.base.plan_made)
        if plan != previous:
            storage.write_bytes(self.uri("plan.json"), plan.model_dump_json(indent=1).encode())
        self.__dict__["plan_made"] = plan
        return plan

    def _read_plan(self) -> Plan | None:
        text = storage.read_if_there(self.uri("plan.json"))
        try:
            return None if text is None else Plan.model_validate_json(text)
        except ValidationError:
            uri = self.uri("plan.json")
            raise ManifestError(f"{uri} is damaged or of another version; remove it, it is made again") from None

    def pin_sources(self) -> None:
        """Write down which commits the hub names of this run stand for, so that all of its stages take the same."""
        paths = (self.config.seed_model.path, self.config.tokenizer.path)
        found = {path: pinned(path) for path in paths if path is not None and is_hub_name(path)}
        if found:
            storage.write_bytes(self.uri(SOURCES_FILE), json.dumps(found, indent=1).encode())
        self.__dict__["_pinned"] = found

    @cached_property
    def _pinned(self) -> dict[str, str]:
        uri = self.uri(SOURCES_FILE)
        found: dict[str, str] = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else {}
        return found

    def given(self, path: str) -> str:
        """Path of a given model or tokenizer; a hub name with the commit that it stood for when the run was planned."""
        return self._pinned.get(path, path) if is_hub_name(path) else path
