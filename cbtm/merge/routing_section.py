"""Routing over a document, as coloured text: which expert each piece of a document falls to.

The text is hostile and its whitespace is part of it: it goes to the template in pieces, each of them with the name of
a colour and of a strength and nothing else, and the template escapes it. Colours tell experts apart at a glance and
run out after ten; the number of the expert, written where it changes, is what counts.
"""

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cbtm.merge.figures import DIRECTIONS, plain_text

_CHARACTERS = 1500
_DOCUMENTS = 3
_COLOURS = 10
_LEVELS = (0.4, 0.6, 0.8)
"""Weights at which a piece's colour becomes stronger."""


def routed_documents(result: Mapping[str, Any], terms: Mapping[int, Sequence[str]]) -> list[dict[str, Any]]:
    """Documents in pieces that the page can write.

    Args:
        result: The content of result.json.
        terms: Top terms of each cluster, plain text.

    Returns:
        For each document "sp_id" (or None), "cluster", "terms", "cut" (whether text is left out) and "pieces": each
        with "lead" (its leading whitespace), "text" (the rest), "cluster", "title", "colour" (0 to 9), "level" (0 to
        3) and "changes" (whether the expert is another than that of the piece before).
    """
    colours = _colours(result)
    return [_document(document, terms, colours) for document in (result.get("routing") or ())[:_DOCUMENTS]]


def routing_legend(result: Mapping[str, Any], terms: Mapping[int, Sequence[str]]) -> list[dict[str, Any]]:
    """The experts of the shown text with colour, top terms and share of the characters, the largest first."""
    shares = _characters(result)
    total = sum(shares.values())
    return [
        {"cluster": cluster, "colour": colour, "terms": ", ".join(terms.get(cluster, ())[:5]), "share": share / total}
        for (cluster, colour), share in (((c, colour), shares[c]) for c, colour in _colours(result).items())
    ]


def kept_text(text: object, limit: int) -> str:
    """Text with its whitespace, without control, direction or surrogate characters, cut to `limit` characters."""
    cut = str(text)[:limit].replace("\r\n", "\n").replace("\r", "\n")
    kept = (c if c in "\n\t" or unicodedata.category(c) not in {"Cc", "Cs"} else "\ufffd" for c in cut)
    return "".join(kept).translate(DIRECTIONS)


def _document(
    document: Mapping[str, Any], terms: Mapping[int, Sequence[str]], colours: Mapping[int, int]
) -> dict[str, Any]:
    pieces: list[dict[str, Any]] = []
    for text, cluster, weight in _shown(document):
        words = ", ".join(terms.get(cluster, ())[:3])
        expert = f"expert {cluster}: {words}" if words else f"expert {cluster}"
        pieces.append(
            {
                "lead": text[: len(text) - len(text.lstrip())],
                "text": text.lstrip(),
                "cluster": cluster,
                "title": f"{expert}; weight {weight:.2f}",
                "colour": colours[cluster],
                "level": sum(weight >= least for least in _LEVELS),
                "changes": not pieces or pieces[-1]["cluster"] != cluster,
            }
        )
    sp_id = document.get("sp_id")
    return {
        "sp_id": None if sp_id is None else plain_text(sp_id, 200),
        "cluster": document["cluster"],
        "terms": ", ".join(terms.get(document["cluster"], ())[:3]),
        "cut": sum(len(piece[0]) for piece in document["pieces"]) > _CHARACTERS,
        "pieces": pieces,
    }


def _shown(document: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """Pieces of a document up to the number of characters that is shown."""
    shown: list[tuple[str, int, float]] = []
    left = _CHARACTERS
    for text, cluster, weight in document["pieces"]:
        if left <= 0:
            break
        shown.append((kept_text(text, left), cluster, weight))
        left -= len(text)
    return shown


def _characters(result: Mapping[str, Any]) -> Counter[int]:
    """Characters of the shown text of each expert."""
    counts: Counter[int] = Counter()
    for document in (result.get("routing") or ())[:_DOCUMENTS]:
        for text, cluster, _ in _shown(document):
            counts[cluster] += len(text)
    return counts


def _colours(result: Mapping[str, Any]) -> dict[int, int]:
    """A colour for each expert of the shown text: the experts with the most text have colours of their own."""
    ranked = sorted(_characters(result).items(), key=lambda one: (-one[1], one[0]))
    return {cluster: rank % _COLOURS for rank, (cluster, _) in enumerate(ranked)}
