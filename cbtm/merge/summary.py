"""The result of a run as a few lines of Markdown, for a page that shows no HTML."""

import re
from collections.abc import Mapping
from typing import Any

from cbtm.merge.figures import format_perplexity
from cbtm.merge.headline import headline_arms, remarks, verdict

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|<>~&])")


def render_summary(result: Mapping[str, Any]) -> str:
    """Render what the experts come to, against the dense model and the others.

    Args:
        result: The content of result.json.

    Returns:
        Markdown with one table; text of the run's own is escaped, so that it shows as it is.

    Raises:
        DataError: If `result` is of another format.
    """
    arms = headline_arms(result)
    lines = [
        f"# {_plain(result['run']['name'])}",
        "",
        _plain(verdict(result)),
        "",
        "| model | perplexity | bits/byte | 95 % interval | vs dense |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in (arm.row for arm in arms):
        interval = " to ".join(map(format_perplexity, row.interval)) if row.interval else "-"
        change = "-" if row.change_to_dense is None else f"{100 * row.change_to_dense:+.1f} %"
        perplexity = format_perplexity(row.perplexity)
        lines.append(f"| {_plain(row.name)} | {perplexity} | {row.bits_per_byte:.3f} | {interval} | {change} |")
    lines += ["", *(f"- {_plain(remark)}" for remark in remarks(result, arms)), ""]
    lines.append(f"Everything of this run is below `{result['run']['root'].replace('`', '')}`.")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown takes for nothing else than text, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
