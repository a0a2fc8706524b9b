"""Generation from a mixture of experts: the nearest ones or all, against running all of them over again at each token.

    python benchmarks/generation.py [--corpus FOLDER] [--prompt 128] [--new 128] [--repeats 3]

Experts are OPTs with random weights, which would write nonsense; so each contender goes through transformers' greedy
search, or a loop of its own, but is made to write the continuation of a real document: all read and write the same
tokens, and the router sees text as it is. Router and tokenizer are fitted on the same texts before; with a learned
route the nearest experts change as often as those of a real run do.

The peers run every expert at every token, one after the other, and mix with the same weights: one feeds the whole text
each time, as the code released with the paper does, the other keeps each expert's keys and values, in the plainest
loop. The probabilities that contenders with the same top-k give to the document are compared. The share of tokens fed
counts a prompt's, and those that an expert that comes back has missed; 1 is every token to every expert.
--small runs the same code with tiny shapes; its figures mean nothing.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch
    from corpora import (
        Measurement,
        add_text_arguments,
        alternate,
        hardware,
        header,
        limit_threads,
        median,
        row,
        text_of,
    )
    from records import Records, add_json_argument
    from router import CLUSTERS, Fitted
    from transformers import LogitsProcessor

    from cbtm.branch.seed import ScratchModelConfig, create_model
    from cbtm.branch.tokenizer import TextTokenizer
    from cbtm.merge.generation import MixtureForCausalLM
    from cbtm.merge.mixture_cache import MixtureCache
    from cbtm.merge.router import PrefixRouter, routing_weights
except ModuleNotFoundError as missing:
    raise SystemExit(f"this benchmark needs {missing.name}: install it (for cbtm, PYTHONPATH=. will do)") from missing

TEMPERATURE = 0.1
ANEW, CACHED = "all, the text over again", "all, plain loop with caches"


@dataclass(frozen=True)
class Case:
    """Experts, router, and the documents that are written.

    Attributes:
        folder: With the tokenizer.
        documents: Texts of more tokens than `prompt` and `new`.
        new: Tokens that are generated for each document.
    """

    folder: Path
    router: PrefixRouter
    documents: list[str]
    shape: ScratchModelConfig
    prompt: int
    new: int

    def tokenizer(self) -> TextTokenizer:
        return TextTokenizer.load(self.folder)

    def experts(self) -> list[Any]:
        tokenizer, made = self.tokenizer(), []
        for number in range(self.router.n_clusters):
            model: Any = create_model(
                self.shape.model_copy(update={"random_state": number}),
                vocab_size=tokenizer.vocab_size,
                separator_id=tokenizer.separator_id,
                context_length=self.prompt + self.new,
            ).eval()
            with torch.no_grad():  # weights as large as trained ones, so that experts differ
                for parameter in model.parameters():
                    if parameter.ndim == 2:
                        parameter.mul_(4)
            made.append(model)
        return made

    def rows(self) -> list[torch.Tensor]:
        """Tokens of each document, the separator first; int64 (prompt + new,)."""
        rows = self.tokenizer().encode_batch(self.documents)
        return [torch.from_numpy(tokens[: self.prompt + self.new]) for tokens in rows]


class Written(LogitsProcessor):
    """Lets the next token of a document alone through, and keeps its log-probability."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._tokens, self.log_probs = tokens, list[float]()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self._tokens[input_ids.shape[1]]
        self.log_probs.append(float(scores[0, token]))
        return torch.full_like(scores, -torch.inf).index_fill(1, token[None], 0.0)


# --- contenders: each gives log-probabilities of the new tokens of each document, by top-k, and the share of tokens ---


def mixture(case: Case, top_k: int, threads: int) -> Callable[[], Any]:
    torch.set_num_threads(threads)
    mixed = MixtureForCausalLM(case.experts(), case.router, case.tokenizer(), temperature=TEMPERATURE, top_k=top_k)
    rows = case.rows()

    def generate(some: Sequence[torch.Tensor], new: int) -> dict[str, Any]:
        found, fed = [], 0
        for tokens in some:
            written, cache = Written(tokens), MixtureCache()
            prompt: Any = tokens[None, : case.prompt]
            model: Any = mixed
            model.generate(
                prompt, min_new_tokens=new, max_new_tokens=new, past_key_values=cache, logits_processor=[written]
            )
            found.append(written.log_probs)
            fed += sum(map(sum, cache.tokens_fed))
        whole = len(some) * (case.prompt + new - 1) * case.router.n_clusters
        return {"log_probs": {top_k: np.array(found)}, "fed": fed / whole}

    generate(rows[:1], 4)
    return lambda: generate(rows, case.new)


def over_again(case: Case, top_ks: Sequence[int], threads: int, *, keeps: bool) -> Callable[[], Any]:
    torch.set_num_threads(threads)
    experts, tokenizer, rows = case.experts(), case.tokenizer(), case.rows()

    @torch.inference_mode()
    def generate(some: Sequence[torch.Tensor], new: int) -> dict[str, Any]:
        found: dict[int, list[list[float]]] = {top_k: [] for top_k in top_ks}
        for tokens, document in zip(some, case.documents, strict=False):
            starts = tokenizer.encode_with_starts(document)[1]
            written: dict[int, list[float]] = {top_k: [] for top_k in top_ks}
            pasts: list[Any] = [None] * len(experts)
            for place in range(case.prompt, case.prompt + new):
                begin = place - 1 if keeps and place > case.prompt else 0
                ours = []
                for number, expert in enumerate(experts):
                    out = expert(
                        input_ids=tokens[None, begin:place],
                        past_key_values=pasts[number],
                        use_cache=keeps,
                        logits_to_keep=1,
                    )
                    pasts[number] = out.past_key_values if keeps else None
                    ours.append(out.logits[0, -1].log_softmax(dim=-1))
                near = case.router.distances(document, starts[place : place + 1])[0]
                for top_k, log_probs in written.items():
                    weights = torch.from_numpy(routing_weights(near, temperature=TEMPERATURE, top_k=top_k))
                    mixed = torch.logsumexp(torch.stack(ours) + weights.log().float()[:, None], dim=0)  # (V,)
                    log_probs.append(float(mixed[tokens[place]]))
            for top_k, log_probs in written.items():
                found[top_k].append(log_probs)
        return {"log_probs": {top_k: np.array(values) for top_k, values in found.items()}}

    generate(rows[:1], 4)
    return lambda: generate(rows, case.new)


def anew(case: Case, top_ks: Sequence[int], threads: int) -> Callable[[], Any]:
    return over_again(case, top_ks, threads, keeps=False)


def cached(case: Case, top_ks: Sequence[int], threads: int) -> Callable[[], Any]:
    return over_again(case, top_ks, threads, keeps=True)


# --- tables ---


def compare(case: Case, args: argparse.Namespace, records: Records) -> None:
    n_experts = case.router.n_clusters
    top_ks = sorted({1, min(2, n_experts), n_experts})
    ours = {f"mixture, top-{top_k}" if top_k < n_experts else "mixture, all": top_k for top_k in top_ks}
    contenders: dict[str, tuple[Any, ...]] = {
        **{name: (mixture, case, top_k, args.threads) for name, top_k in ours.items()},
        CACHED: (cached, case, top_ks, args.threads),
        ANEW: (anew, case, top_ks, args.threads),
    }
    runs = alternate(contenders, repeats=args.repeats, limit_s=args.limit)
    found = {name: median(some) for name, some in runs.items()}
    header("", "tokens/s", "range", "ratio to the text over again", "share of tokens fed", "peak MB", "apart by")
    n_new = len(case.documents) * case.new
    title = f"{n_experts} experts, prompt of {case.prompt}, {case.new} new tokens"
    for name, run in found.items():
        if run.error:
            row(name, "failed: " + run.error, *[""] * 5)
            records.measured(title, name, runs[name], unit="tokens/s")
            continue
        speeds = [n_new / one.seconds for one in runs[name]]
        shares = run.value.get("fed")
        row(name, f"{n_new / run.seconds:.1f}", f"{min(speeds):.1f}-{max(speeds):.1f}",
            f"{found[ANEW].seconds / run.seconds:.1f}", "" if shares is None else f"{shares:.3f}",
            f"{run.peak_bytes / 1e6:,.0f}", f"{apart_from(found[ANEW], run):.1e}")  # fmt: skip
        note = "" if shares is None else f"{shares:.2f} of the tokens fed"
        records.add(
            title, name, "tokens/s", speeds, peak_bytes=run.peak_bytes, is_ours=ours.get(name) == n_experts, note=note
        )
    print()
    goals_of(found, ours, records)


def apart_from(peer: Measurement, run: Measurement) -> float:
    """Largest difference of log-probabilities from the peer's, over the top-k that both have."""
    if peer.error or run.error:
        return float("nan")
    theirs = peer.value["log_probs"]
    return max(float(np.abs(values - theirs[top_k]).max()) for top_k, values in run.value["log_probs"].items())


def goals_of(found: Mapping[str, Measurement], ours: Mapping[str, int], records: Records) -> None:
    for name in ours:
        apart = apart_from(found[ANEW], found[name])
        records.goal(f"{name}: log-probabilities equal to 1e-4", apart <= 1e-4, found[name].error or f"{apart:.1e}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256, help="of the experts")
    parser.add_argument("--layers", type=int, default=4, help="of the experts")
    parser.add_argument("--written", type=int, default=3, metavar="N", help="documents that are written")
    parser.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens that are given")
    parser.add_argument("--new", type=int, default=128, metavar="N", help="tokens that are generated")
    add_text_arguments(parser)
    add_json_argument(parser)
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.documents = args.documents or 4000
    if args.small:
        args.documents, args.vocabulary, args.width, args.layers, args.repeats = 400, 400, 16, 1, 1
        args.written, args.prompt, args.new = 1, 16, 8
    threads = limit_threads(args.threads)
    text = text_of(args)
    texts = list(text.texts())
    tokenizer = TextTokenizer.train(texts, args.vocabulary)
    length = args.prompt + args.new
    long = (document for document in texts if len(tokenizer.encode_batch([document])[0]) > length)
    documents = list(islice(long, args.written))
    if len(documents) < args.written:
        raise SystemExit(f"{text} has {len(documents)} documents of more than {length} tokens; use --documents")
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save(Path(name))
        shape = ScratchModelConfig(hidden_size=args.width, n_layers=args.layers, n_heads=4)
        case = Case(Path(name), Fitted.on(texts).router, documents, shape, args.prompt, args.new)
        print(
            f"{hardware('numpy', 'torch', 'transformers')}; {threads}; {CLUSTERS} experts, OPT {args.layers} x "
            f"{args.width}, vocabulary {tokenizer.vocab_size}; {len(documents)} documents of {text}, prompt of "
            f"{args.prompt} tokens, {args.new} new; median of {args.repeats}\n"
        )
        if args.small:
            print("tiny shapes, figures mean nothing\n")
        records = Records(args.json)
        compare(case, args, records)


if __name__ == "__main__":
    main()
