"""What the report says of the domains: their cards, the balance and the agreement in words, their figures.

A result of cbtm 0.1.0 has neither positions nor neighbours nor borderline documents; its page goes without them.
"""

from collections.abc import Mapping
from typing import Any

from cbtm.merge.domain_figures import domain_map, size_chart
from cbtm.merge.figures import plain_text

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
    """The rows of the table of perplexities, domain by domain."""
    terms = domain_terms(result)
    return [
        {
            **row,
            "terms": ", ".join(terms.get(row["cluster"], [])[:3]),
            "ratio": row["ensemble"] / row["dense"] if row["dense"] and row["ensemble"] is not None else None,
        }
        for row in result["by_domain"]
    ]


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
