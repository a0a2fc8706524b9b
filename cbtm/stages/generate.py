"""Generation from a finished run: its experts, mixed as its evaluation found best."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cbtm import storage
from cbtm.branch.seed import load_model
from cbtm.cluster.clusterer import DOMAINS_FILE, read_ancestors
from cbtm.errors import ConfigError
from cbtm.merge.binding import check_experts
from cbtm.merge.router import PrefixRouter
from cbtm.run import RESULT_FILE, Run
from cbtm.stages.experts import prefix_token
from cbtm.stages.held_out import open_router_parts
from cbtm.stages.result import read_domains
from cbtm.train.member import Member

if TYPE_CHECKING:
    from cbtm.merge.generation import MixtureForCausalLM

# As in the code released with c-BTM, where a run was not evaluated; the exponent is the paper's.
_TEMPERATURE, _DISTANCE_POWER = 0.1, 2.0


def open_mixture(
    run: Run,
    scratch: Path,
    *,
    top_k: int | None = None,
    temperature: float | None = None,
    distance_power: float | None = None,
    refresh: int | Literal["once"] = 1,
    experts: list[int] | None = None,
) -> "MixtureForCausalLM":
    """Open the experts of a run as one model that generates.

    Args:
        run: A run whose experts are trained.
        scratch: Folder for what is downloaded.
        top_k: Experts that run at a token; None is all.
        temperature: Temperature of the routing weights; None is the one that the evaluation chose for this top-k, or
            0.1 where there was none.
        distance_power: Exponent of the distance; None likewise, or 2.
        refresh: Tokens between two estimates of the weights; once is those of the prompt.
        experts: Clusters whose experts are mixed; None is all that were trained.

    Raises:
        ConfigError: If an expert is asked for that was not trained, or a setting is out of range.
        ManifestError: If an expert is not there, or belongs to another clusterer.
    """
    from cbtm.merge.generation import MixtureForCausalLM

    trained = run.config.trained_clusters
    clusters = trained if experts is None else sorted(set(experts))
    if missing := sorted(set(clusters) - set(trained)):
        raise ConfigError(f"cluster {missing[0]} has no expert; trained are {', '.join(map(str, trained))}")
    members = [Member("expert", cluster) for cluster in clusters]
    check_experts(
        {cluster: run.train_spec(member).root for cluster, member in zip(clusters, members, strict=True)},
        clusterer_digest=run.clusterer_digest,
        ancestors=read_ancestors(run.cluster_spec().root),
    )
    clusterer, tokenizer = open_router_parts(run, scratch)
    router = PrefixRouter(clusterer.embedder.vocabulary_, clusterer.embedder.word_vectors_, clusterer.centers)
    chosen = _chosen(run, len(clusters) if top_k is None else top_k)
    tokens = [prefix_token(run, member, scratch) for member in members]
    return MixtureForCausalLM(
        [load_model(run.fetch(run.train_spec(member), scratch / member.name)) for member in members],
        router.subset(clusters),
        tokenizer,
        temperature=chosen.get("temperature", _TEMPERATURE) if temperature is None else temperature,
        distance_power=chosen.get("distance_power", _DISTANCE_POWER) if distance_power is None else distance_power,
        top_k=top_k,
        refresh=refresh,
        clusters=clusters,
        prefix_tokens=None if tokens[0] is None else [token for token in tokens if token is not None],
    )


def domain_terms(run: Run, scratch: Path) -> dict[int, list[str]]:
    """The terms that set each domain of a run apart."""
    described = read_domains(run.fetch(run.cluster_spec(), scratch) / DOMAINS_FILE)
    return {domain["cluster"]: domain["top_terms"] for domain in described["domains"]}


def _chosen(run: Run, top_k: int) -> Mapping[str, Any]:
    """The routing that the evaluation chose for this many experts, or for the nearest number of them."""
    if not storage.exists(run.uri(RESULT_FILE)):
        return {}
    result = json.loads(storage.read_bytes(run.uri(RESULT_FILE)))
    rows = [row for row in result["ensemble"] if row["ensemble"] == "clustering" and row["selected"]]
    best: Mapping[str, Any] = min(rows, key=lambda row: abs(row["top_k"] - top_k), default={})
    return best
