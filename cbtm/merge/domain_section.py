"""What the report says of the domains: their cards, the balance and the agreement in words, their figures; and how
the models do on the documents of each domain and of each label.

A result of cbtm 0.1.0 has neither positions nor neighbours nor borderline documents, nor intervals by domain; its page
goes without them. Null in a table of perplexities is no model or no document, or else it is infinite: which of the two
follows from the arms and documents that the result has.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cbtm.merge.comparison_figures import domain_chart, expert_map
from cbtm.merge.domain_figures import domain_map, size_chart
from cbtm.merge.figures import NAMED_DOMAINS, format_change, plain_text, show_perplexity
from cbtm.merge.headline import (
    interval_of,
    left_out_clusters,
    mixed_clusters,
    or_infinite,
    selected_ensembles,
    shown_clusters,
)

_EXAMPLE_CHARACTERS = 300
_TERM_CHARACTERS = 40
_DOCUMENTS_SHOWN = 3


def domain_terms(result: Mapping[str, Any]) -> dict[int, list[str]]:
    """Top terms of each cluster, each of them one short line."""
    return {
        domain["cluster"]: [plain_text(term, _TERM_CHARACTERS) for term in domain["top_terms"]]
        for domain in result["domains"]
    }


def domain_cards(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The domains with all texts cut to what a card shows, and what their experts reach alone."""
    terms = domain_terms(result)
    alone = {expert["cluster"]: expert["perplexity"] for expert in result["experts"]}
    alone |= {cluster: or_infinite(alone[cluster]) for cluster in _measured_alone(result) if cluster in alone}
    return [
        {
            **domain,
            "top_terms": terms[domain["cluster"]],
            "alone": alone.get(domain["cluster"]),
            "examples": [_document(one) for one in domain["examples"][:_DOCUMENTS_SHOWN]],
            "borderline": [
                {**_document(one), "other": one["other"], "other_terms": ", ".join(terms[one["other"]][:3])}
                for one in domain.get("borderline", [])[:_DOCUMENTS_SHOWN]
            ],
            "near": [
                {"cluster": one["cluster"], "term": _own_term(terms[one["cluster"]], terms[domain["cluster"]])}
                for one in domain.get("neighbours", [])
            ],
            "labels": [
                {"label": plain_text(one["label"], _TERM_CHARACTERS), "share": one["share"]}
                for one in domain.get("labels", [])
                if one["share"] >= 0.005  # the rest would be 0 %
            ],
        }
        for domain in result["domains"]
    ]


def domain_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of perplexities, domain by domain.

    Returns:
        The rows of `by_domain` with infinite perplexities as such, and with "terms", "ratio" to dense and its
        "ratio_interval" (None where not known), "marked" (whether that excludes 1) and "without": the ratio to the
        ensemble of all trained experts, where some are left out on purpose.
    """
    terms, alone = domain_terms(result), _measured_alone(result)
    rows = []
    for row in result["by_domain"]:
        arms = {*_arms_of(result), *(["own_expert"] if row["cluster"] in alone else [])}
        rows.append({**_group(row, arms), "terms": ", ".join(terms.get(row["cluster"], [])[:3])})
    return rows


def label_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same by the labels that documents came with; nothing where they had none."""
    return [
        {**_group(row, _arms_of(result)), "label": plain_text(row["label"], _TERM_CHARACTERS)}
        for row in result.get("by_label") or ()
    ]


def left_out_remark(result: Mapping[str, Any]) -> str | None:
    """What leaving trained experts out on purpose does to the documents of their domains and to the others."""
    left_out = left_out_clusters(result)
    if not left_out:
        return None
    one = len(left_out) == 1
    k = len(mixed_clusters(result))
    text = (
        f"The {'expert' if one else 'experts'} of {'cluster' if one else 'clusters'} {shown_clusters(left_out)} "
        f"{'was' if one else 'were'} trained and {'is' if one else 'are'} left out on purpose: the ensembles on "
        f"this page mix {k} of {k + len(left_out)} experts."
    )
    rows = [row for row in result["by_domain"] if row.get("ensemble_all") is not None and row["ensemble"] is not None]
    for where, there in ((f"{'its domain' if one else 'their domains'}", True), ("the other domains", False)):
        of_them = [row for row in rows if (row["cluster"] in left_out) == there]
        if of_them:
            without, whole = (_together(of_them, arm) for arm in ("ensemble", "ensemble_all"))
            text += (
                f" On the documents of {where} perplexity is {show_perplexity(without)}, and "
                f"{show_perplexity(whole)} with all trained experts: leaving out changes it by "
                f"{format_change(without / whole)}."
            )
    return text


def expert_map_remark(result: Mapping[str, Any]) -> str | None:
    """In how many domains the own expert is the best of all; None without a table of experts by domain."""
    found = result.get("domain_by_expert")
    if not found:
        return None
    own = [row for row in _best_experts(result) if row[0] in found["clusters"]]
    best = sum(domain == expert for domain, expert, _ in own)
    return f"In {best} of {len(own)} domains that have an expert of their own, it is the best of all experts."


def domain_remarks(result: Mapping[str, Any]) -> list[str]:
    """Sentences on the balance of the domains and on their agreement with labels; none where nothing is known."""
    remarks = []
    sizes = result.get("balance")
    if sizes and result["n_clusters"] > 1:
        fit = sizes["fit"]
        span = f"{fit['smallest']:,}" if fit["ratio"] == 1 else f"{fit['smallest']:,} to {fit['largest']:,}"
        remarks.append(
            f"{_times(sizes['documents'], 'documents')}. {_times(sizes['tokens'], 'tokens')}. These are the "
            f"documents as assigned; the clusters of the fit, which placed the centres, hold {span} each."
        )
    found = result.get("labels")
    if found:
        greedy = found["nearest"]
        remarks.append(
            f"Against the labels of {found['n_labelled']:,} documents of the fit, in {found['n_labels']:,} kinds: "
            f"normalised mutual information {found['nmi']:.2f} and purity {found['purity']:.2f} for the clusters of "
            f"the fit, {greedy['nmi']:.2f} and {greedy['purity']:.2f} with every document at its nearest centre."
        )
    return remarks


def draw_domains(result: Mapping[str, Any]) -> dict[str, str]:
    """The map and the sizes as SVG by name; a map needs positions, and both need a second domain."""
    domains, terms = result["domains"], domain_terms(result)
    if len(domains) < 2:
        return {}
    largest = max(domains, key=lambda domain: domain["tokens"])
    label = (
        f"Share of {len(domains)} domains in documents and tokens; the largest by tokens is {largest['cluster']} with "
        f"{100 * largest['share_tokens']:.1f} %."
    )
    drawn = {"sizes": size_chart(domains, terms, label=label)}
    if all("position" in domain for domain in domains):
        nearest = "; ".join(f"{domain['cluster']} to {domain['neighbours'][0]['cluster']}" for domain in domains)
        label = f"Map of {len(domains)} domains. Each with the one nearest to it: {nearest}."
        drawn["map"] = domain_map(domains, terms, label=label)
    return drawn


def draw_comparisons(result: Mapping[str, Any]) -> dict[str, str]:
    """Dense model against ensemble, and every expert on every domain, as SVG by name, each where there is data."""
    drawn, terms = {}, domain_terms(result)
    both = [row for row in result["by_domain"] if row["dense"] is not None and row["ensemble"] is not None]
    if both:
        wins = sum(row["ensemble"] < row["dense"] for row in both)
        label = f"Dense model against ensemble in each domain; the ensemble is lower in {wins} of {len(both)}."
        sure = sum(row["marked"] for row in domain_rows(result))
        if any(row.get("dense_ratio_interval") for row in both):
            label += f" The interval of the change excludes 0 in {sure}."
        drawn["domains"] = domain_chart(both, terms, label=label)
    found = result.get("domain_by_expert")
    best = _best_experts(result)
    if found and best and len(found["perplexity"]) > 1:
        label = (
            f"Perplexity of {len(found['clusters'])} experts on {len(found['perplexity'])} domains. "
            f"{expert_map_remark(result)}"
        )
        if len(best) <= NAMED_DOMAINS:
            each = (f"domain {domain} by {expert} with {show_perplexity(value)}" for domain, expert, value in best)
            label += f" The best: {'; '.join(each)}."
        drawn["experts"] = expert_map(found["perplexity"], found["clusters"], terms, label=label)
    return drawn


def _arms_of(result: Mapping[str, Any]) -> set[str]:
    """The arms that were measured, whose perplexity is infinite where it is null beside documents."""
    arms = {arm for arm in ("seed", "dense", "random") if result.get(arm)}
    arms |= {"ensemble"} if selected_ensembles(result) else set()
    return arms | ({"ensemble_all"} if left_out_clusters(result) else set())


def _measured_alone(result: Mapping[str, Any]) -> set[int]:
    """Clusters whose expert was measured by itself, as far as the result says."""
    return set((result.get("domain_by_expert") or {}).get("clusters", ()))


def _group(row: Mapping[str, Any], arms: set[str]) -> dict[str, Any]:
    """A row of `by_domain` or `by_label` with what its table needs."""
    shown = {**dict.fromkeys(_COLUMNS), **row}
    if row["n_documents"]:
        shown |= {arm: or_infinite(shown[arm]) for arm in arms}
    ensemble, dense, whole = shown["ensemble"], shown["dense"], shown["ensemble_all"]
    stored = shown["dense_ratio"]
    ratio_interval = interval_of(shown["dense_ratio_interval"])
    return {
        **shown,
        "interval": interval_of(shown["interval"]),
        "dense_interval": interval_of(shown["dense_interval"]),
        "ratio": stored if stored is not None else _ratio(ensemble, dense),
        "ratio_interval": ratio_interval,
        "marked": ratio_interval is not None and not ratio_interval[0] <= 1 <= ratio_interval[1],
        "without": _ratio(ensemble, whole),
    }


_COLUMNS = (
    *("seed", "dense", "random", "own_expert", "ensemble", "ensemble_all"),
    *("interval", "dense_interval", "dense_ratio", "dense_ratio_interval"),
)


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base and math.isfinite(base) else None


def _together(rows: Sequence[Mapping[str, Any]], arm: str) -> float:
    """Perplexity on the documents of several domains."""
    nats = sum(row["n_tokens"] * math.log(row[arm]) for row in rows)
    return math.exp(nats / sum(row["n_tokens"] for row in rows))


def _best_experts(result: Mapping[str, Any]) -> list[tuple[int, int, float]]:
    """For each domain with documents its number, the cluster of the best expert on it, and its perplexity."""
    found = result.get("domain_by_expert") or {"clusters": [], "perplexity": []}
    best = []
    for domain, values in enumerate(found["perplexity"]):
        known = [
            (value, cluster) for value, cluster in zip(values, found["clusters"], strict=True) if value is not None
        ]
        if known:
            value, cluster = min(known)
            best.append((domain, cluster, value))
    return best


def _own_term(terms: list[str], others: list[str]) -> str:
    """The first term that a neighbour does not share, by which it is told apart; its first where all are shared."""
    return next((term for term in terms if term not in others), terms[0] if terms else "")


def _document(example: Mapping[str, Any]) -> dict[str, str]:
    return {name: plain_text(example[name], _EXAMPLE_CHARACTERS) for name in ("sp_id", "text")}


def _times(sizes: Mapping[str, Any], unit: str) -> str:
    smallest, largest = sizes["smallest"], sizes["largest"]
    if sizes["ratio"] is None:
        return f"By {unit} the largest domain has {largest:,} and the smallest none"
    return f"By {unit} the largest domain is {sizes['ratio']:.1f} times the smallest ({largest:,} and {smallest:,})"
