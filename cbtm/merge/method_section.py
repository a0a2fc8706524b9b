"""How a result was measured, in sentences from its counters and settings; nothing where it does not have them."""

from collections.abc import Mapping
from typing import Any


def method_remarks(result: Mapping[str, Any]) -> list[str]:
    """Paragraphs of what scoring cost, how text was routed where that is not the default, and impossible tokens."""
    found = (_scoring(result), _routing(result), _preset(result), _impossible(result))
    return [paragraph for paragraph in found if paragraph]


def _scoring(result: Mapping[str, Any]) -> str | None:
    scoring = result.get("scoring")
    if not scoring:
        return None
    models, passes = scoring["models"], "one pass" if scoring["models"] == 1 else f"{scoring['models']} passes"
    text = (
        f"Scoring {models} model{'s' if models != 1 else ''} took {passes} over the validation tokens, whatever the "
        f"number of settings: {scoring['forward_passes']:,} forward passes of batches, {scoring['tokens_fed']:,} "
        f"tokens fed, {scoring['tokens_scored']:,} scored. The {len(result['ensemble']):,} settings of the ensembles "
        "are arithmetic on those scores."
    )
    if scoring.get("top_k") is not None:
        share = scoring["compute_share"]
        text += (
            f" An expert was scored only where it is among the {scoring['top_k']} nearest to a token’s context, which "
            f"took {100 * share:.0f} % of the compute of full passes and saved {100 - round(100 * share):.0f} %."
        )
    return text


def _routing(result: Mapping[str, Any]) -> str | None:
    settings = result.get("routing_settings") or {}
    parts = []
    lag, refresh, ratio = (settings.get(key, usual) for key, usual in _DEFAULTS.items())
    if lag:
        unseen = "the token just before it" if lag == 1 else f"the {lag} tokens just before it"
        parts.append(f"The weights at a token do not see {unseen} (lag {lag}).")
    if refresh == "once":
        parts.append("They are estimated once for a document, before the first token that counts.")
    elif refresh != 1:
        parts.append(f"They are estimated anew every {refresh} tokens only.")
    if ratio != 1:
        parts.append(f"After {100 * ratio:g} % of a document they stay as they are.")
    if parts and not lag:
        parts[0] = parts[0].replace("They", "The weights", 1).replace("they stay", "the weights stay", 1)
    return " ".join(parts) or None


_DEFAULTS: dict[str, Any] = {"lag": 0, "refresh": 1, "context_ratio": 1.0}


def _preset(result: Mapping[str, Any]) -> str | None:
    name = (result.get("routing_settings") or {}).get("preset")
    if name is None:
        return None
    if name != "reference":
        return f"The preset “{name}” set how documents are scored and routed."
    return (
        "The preset “reference” follows the arithmetic of the code released with c-BTM: distance to the power 4, "
        "temperature 0.1, documents cut at 2,049 tokens, no token for the beginning of a document, its first token "
        "given and not scored, and weights that do not see the token before. Only figures under this preset compare "
        "with those of the reference, and they do not compare with the default’s. One thing is not followed: "
        "the reference leaves impossible tokens out of the sum and of the count; here they count."
    )


def _impossible(result: Mapping[str, Any]) -> str | None:
    """What an infinite perplexity means; only where there is one or a result counts such tokens."""
    arms = [result.get("seed"), result.get("dense"), result.get("random"), result.get("best_single_expert")]
    arms += [*result["ensemble"], *(result.get("averages") or ())]
    known = [arm["impossible_tokens"] for arm in arms if arm and arm.get("impossible_tokens") is not None]
    if not known:
        return None
    rule = "A token to which a model gives no probability at all counts as impossible: it makes the perplexity infinite"
    n = sum(count > 0 for count in known)
    if n == 0:
        return f"{rule} (∞) and is never left out. No model and no setting here has one."
    infinite = "One model or setting here has" if n == 1 else f"{n} models and settings here have"
    return f"{rule} (∞, with the number of such tokens) and is never left out. {infinite} such tokens."
