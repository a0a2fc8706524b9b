"""Which expert carried which token of a generated text, for a terminal.

An expert's weight is what the router gives it before the token is known; its responsibility is its share of the
probability that the token got, w_c p_c(x) / sum_j w_j p_j(x), the posterior of Bayes' rule. An expert of small weight
carries a token that the others find unlikely.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

# Colours of the 256 that are told apart and read on black and on white; clusters beyond take them again.
_COLOURS = (33, 166, 34, 133, 172, 37, 197, 99, 136, 30, 205, 64)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Explanation:
    """One generated token.

    Attributes:
        token: Its id.
        text: Text that it completes; empty for the separator and within a character.
        log_prob: Natural logarithm of its probability under the mixture.
        weights: Weight by cluster, of the experts that ran; they sum to 1.
        responsibilities: Share of the token's probability by cluster, of the same experts; they sum to 1. The weights
            themselves where every expert finds the token impossible.
    """

    token: int
    text: str
    log_prob: float
    weights: Mapping[int, float]
    responsibilities: Mapping[int, float]

    @property
    def cluster(self) -> int:
        """Cluster of the expert that carried the token; of equal ones the lowest."""
        return max(sorted(self.responsibilities), key=lambda cluster: self.responsibilities[cluster])


def format_explanation(
    tokens: Sequence[Explanation], *, colour: bool, top_terms: Mapping[int, Sequence[str]] | None = None
) -> str:
    """Spell out a generated text with the expert that carried each token, and below it a legend.

    Args:
        tokens: As `MixtureForCausalLM.explain` gives them.
        colour: Whether to use colours, by ANSI escapes. Without, the number of the expert stands in brackets in front
            of what it carried.
        top_terms: Terms of each cluster's domain, for the legend.

    Returns:
        Lines without a final newline. Control characters of the text other than newline and tab are shown as `\\xNN`.
    """
    text = "".join(
        _piece("".join(token.text for token in run), cluster, colour=colour)
        for cluster, run in groupby(tokens, key=lambda token: token.cluster)
    )
    return "\n".join([text, "", *_legend(tokens, colour=colour, top_terms=top_terms or {})])


def _piece(text: str, cluster: int, *, colour: bool) -> str:
    shown = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    if not colour:
        return f"[{cluster}]{shown}"
    # Each line by itself: a pager forgets colours at the end of one.
    return "\n".join(_coloured(line, cluster) for line in shown.split("\n"))


def _coloured(text: str, cluster: int) -> str:
    return f"\x1b[38;5;{_COLOURS[cluster % len(_COLOURS)]}m{text}\x1b[0m" if text else ""


def _legend(tokens: Sequence[Explanation], *, colour: bool, top_terms: Mapping[int, Sequence[str]]) -> list[str]:
    """One line for each expert that ran, the one that carried most first."""
    shares: dict[int, float] = {}
    for token in tokens:
        for cluster, share in token.responsibilities.items():
            shares[cluster] = shares.get(cluster, 0.0) + share / len(tokens)
    lines = []
    for cluster, share in sorted(shares.items(), key=lambda item: (-item[1], item[0])):
        name = _coloured(f"expert {cluster}", cluster) if colour else f"expert {cluster}"
        terms = ", ".join(top_terms.get(cluster, ()))
        lines.append(f"{name} carried {share:.0%}" + (f": {terms}" if terms else ""))
    return lines
