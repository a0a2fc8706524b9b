"""Prefix routing against scikit-learn, which vectorises every prefix anew; and a text that is still being written.

    python benchmarks/router.py [--corpus FOLDER --labels FOLDER] [--prose DOMAIN,…] [--code DOMAIN,…] [--repeats 3]
        [--tokenizer FOLDER] [--routed-split SPLIT]

Text: prose and code, of the named domains where a corpus has labels; without labels the corpus as it is; without a
corpus docstrings and source of the installed numpy, scipy and scikit-learn. Texts are joined until a document is long
enough; the many short documents can be of another split than the clusterer and the long ones. Tokens: those of a
tokenizer, or without one pieces of at most five letters or four other signs with the space before them, or runs of
white space; the table tells how many characters they make. All get the same clusterer (tf-idf without stop words and
numbers, SVD to 100 dimensions, k-means) and the same prefixes as character offsets; decoding tokens to text is counted
for none. The stream gets the text of one token after the other and is asked for distances before each. They take turns
within one process; the table has the median of each and the largest difference of either from scikit-learn's distances.
Of the many short documents scikit-learn gets the first few, and its time is told per position.
--small runs the same code on little text; its figures mean nothing.
"""

import argparse
import ast
import importlib.util
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from cbtm.merge.router import PrefixRouter

if TYPE_CHECKING:
    from corpora import Text
    from records import Records

DIMENSIONS = 100
CLUSTERS = 8
TOKEN = re.compile(r" ?[^\W_]{1,5}| ?[^\w\s]{1,4}|_|\s+")
PROSE, CODE = "prose", "code"
PEER, OURS, STREAM = "scikit-learn", "cbtm router", "cbtm stream"
GOALS = {PROSE: 100, CODE: 30}  # times scikit-learn, at the longest document
Starts = Callable[[str], Sequence[int]]  # the character at which each token of a text starts
Document = tuple[str, NDArray[np.int64]]  # and where each of its tokens starts


class NumberDeletingVectorizer(TfidfVectorizer):
    """Words that begin with a digit are no terms."""

    def build_tokenizer(self) -> Callable[[str], list[str]]:
        tokenize = super().build_tokenizer()
        return lambda text: [word for word in tokenize(text) if not word[0].isdigit()]


def sources(package: str) -> Iterator[Path]:
    """Python files of an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the benchmark takes its text from the package {package}, which is not installed")
    yield from sorted(Path(spec.submodule_search_locations[0]).rglob("*.py"))


def docstrings(package: str) -> Iterator[str]:
    for path in sources(package):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes in other people's sources
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    yield text


@dataclass(frozen=True)
class Fitted:
    """One clusterer, for scikit-learn and for the router."""

    vectorizer: NumberDeletingVectorizer
    svd: TruncatedSVD
    kmeans: KMeans
    router: PrefixRouter

    @classmethod
    def on(cls, texts: Sequence[str]) -> "Fitted":
        vectorizer = NumberDeletingVectorizer(stop_words="english").fit(texts)
        vectors = vectorizer.transform(texts)
        svd = TruncatedSVD(DIMENSIONS, random_state=0).fit(vectors)
        kmeans = KMeans(CLUSTERS, n_init=1, random_state=0).fit(normalize(svd.transform(vectors)))
        word_vectors = (vectorizer.idf_[:, np.newaxis] * svd.components_.T).astype(np.float32)
        return cls(vectorizer, svd, kmeans, PrefixRouter(vectorizer.vocabulary_, word_vectors, kmeans.cluster_centers_))

    def vectorised(self, text: str, starts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Distances (t, k), every prefix vectorised anew."""
        vectors = self.vectorizer.transform([text[:start] for start in starts])
        distances: NDArray[np.float64] = euclidean_distances(
            normalize(self.svd.transform(vectors)), self.kmeans.cluster_centers_
        )
        return distances

    def routed(self, text: str, starts: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.router.distances(text, starts)

    def streamed(self, text: str, starts: NDArray[np.int64]) -> NDArray[np.float32]:
        stream = self.router.stream()
        found = [stream.distances()]
        for begin, end in pairwise(starts.tolist()):
            stream.push(text[begin:end])
            found.append(stream.distances())
        return np.stack(found)


def starts_by(tokenizer: str | None) -> Starts:
    """Starts of the tokens of the tokenizer in a folder, or of pieces."""
    if tokenizer is None:
        return lambda text: [match.start() for match in TOKEN.finditer(text)]
    from cbtm.branch.tokenizer import TextTokenizer

    loaded = TextTokenizer.load(Path(tokenizer))
    return lambda text: loaded.encode_with_starts(text)[1][1:].tolist()  # without the separator


def documents_of(texts: Iterable[str], starts_of: Starts, n_tokens: int, count: int) -> list[Document]:
    """`count` documents of `n_tokens` tokens; texts are used in turn."""
    documents: list[Document] = []
    document = ""
    for text in cycle(texts):
        document += text + "\n\n"
        if len(document) < 3 * n_tokens:
            continue  # most tokens are longer
        starts = starts_of(document)
        if len(starts) >= n_tokens:
            documents.append((document, np.array(starts[:n_tokens])))
            document = ""
            if len(documents) == count:
                break
    if len(documents) < count:
        raise SystemExit("there is no text of this kind to make documents of")
    return documents


def kinds_of_text(text: "Text", domains: dict[str, list[str]]) -> dict[str, list[str]]:
    """Texts of each kind: those of its domains, or what there is without labels."""
    import corpora

    if text.root is None:
        paths = chain.from_iterable(map(sources, corpora.PACKAGES))
        code = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
        return {PROSE: list(text.texts()), CODE: [source for source in code if len(source) > 200][: text.limit]}
    if text.labels_root is None:
        return {"text": list(text.texts())}
    found: dict[str, list[str]] = {kind: [] for kind in domains}
    for document, domain in zip(text.texts(), domain_names(text), strict=True):
        for kind, chosen in domains.items():
            if domain in chosen:
                found[kind].append(document)
    for kind, documents in found.items():
        if not documents:
            raise SystemExit(
                f"no document has a label of --{kind} {','.join(domains[kind])}; "
                f"the labels are {', '.join(sorted(set(domain_names(text))))}"
            )
    return found


def domain_names(text: "Text") -> list[str]:
    """Label of every document of `texts`, in its order; "" where it has none."""
    import corpora

    labels = chain.from_iterable(corpora._domains(Path(text.labels_root or ""), path) for path in text.files())
    domains = dict(labels)
    return [domains.get(corpora._plain(document.sp_id), "") for document in islice(text._documents(), text.limit)]


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def in_turns(contenders: Sequence[Callable[[], object]], repeats: int) -> list[tuple[float, ...]]:
    """Seconds of each repeat, for each contender."""
    times = [[seconds(contender) for contender in contenders] for _ in range(repeats)]
    return list(zip(*times, strict=True))


def compare(fitted: Fitted, kind: str, document: Document, repeats: int, records: "Records") -> float:
    """One row of the table; how many times faster the router is."""
    import corpora

    starts = document[1]
    expected = fitted.vectorised(*document)  # the first run of each is not timed
    apart = max(np.abs(found(*document) - expected).max() for found in (fitted.routed, fitted.streamed))
    contenders = [lambda: fitted.vectorised(*document), lambda: fitted.routed(*document)]
    times = in_turns([*contenders, lambda: fitted.streamed(*document)], repeats)
    peer, ours, stream = map(statistics.median, times)
    for name, of_one in zip((PEER, OURS, STREAM), times, strict=True):
        milliseconds, note = [1e3 * s for s in of_one], f"distances apart by {apart:.1e}" * (name == OURS)
        records.add(f"{kind}, {len(starts):,} tokens", name, "ms", milliseconds, is_ours=name == OURS, note=note)
    corpora.row(kind, len(starts), starts[-1], f"{peer:.3f}", f"{ours * 1e3:.2f}", f"{peer / ours:.0f}",
                f"{stream * 1e3:.2f}", f"{stream / len(starts) * 1e6:.1f}", f"{apart:.1e}")  # fmt: skip
    return peer / ours


def compare_many(
    fitted: Fitted, documents: Sequence[Document], peer_documents: int, repeats: int, records: "Records"
) -> float:
    """Many short documents; seconds of the router for all of them."""
    import corpora

    few = documents[:peer_documents]
    work = [
        (fitted.vectorised, few, PEER),
        (fitted.routed, documents, OURS),
        (fitted.streamed, few, STREAM),
    ]
    times = in_turns([lambda f=f, of=of: [f(*document) for document in of] for f, of, _ in work], repeats)
    corpora.header("", "documents", "positions", "s", "positions/s")
    medians = [statistics.median(of_one) for of_one in times]
    for (_, of, name), took, of_one in zip(work, medians, times, strict=True):
        positions = sum(len(starts) for _, starts in of)
        speeds, note = [positions / s for s in of_one], f"{len(of)} documents"
        records.add("many documents of 255 tokens", name, "positions/s", speeds, is_ours=name == OURS, note=note)
        corpora.row(name, len(of), positions, f"{took:.2f}", f"{positions / took:,.0f}")
    return medians[1]


def parse() -> argparse.Namespace:
    from corpora import add_text_arguments  # which takes `docstrings` from here
    from records import add_json_argument

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="little text, short documents")
    parser.add_argument("--prose", default="novels", metavar="DOMAIN,…", help="labels that are prose")
    parser.add_argument("--code", default="python_code", metavar="DOMAIN,…", help="labels that are code")
    parser.add_argument("--lengths", default="256,512,1024,2048", metavar="N,…", help="tokens of a document")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="tokenizer.json, or vocab.json and merges.txt")
    parser.add_argument("--routed-split", metavar="SPLIT", help="of the documents of 255 tokens; as --split without")
    parser.add_argument("--routed-documents", type=int, default=800, metavar="N", help="of 255 tokens")
    parser.add_argument("--peer-documents", type=int, default=40, metavar="N", help="of them for scikit-learn")
    add_text_arguments(parser)
    add_json_argument(parser)
    return parser.parse_args()


def main() -> None:
    from corpora import hardware, header, limit_threads, text_of
    from records import Records

    args = parse()
    if args.small:
        args.documents, args.lengths, args.repeats = args.documents or 800, "64,128", 1
        args.routed_documents, args.peer_documents = 20, 2
    threads = limit_threads(args.threads)
    text = text_of(args)
    texts = list(text.texts())
    kinds = kinds_of_text(text, {PROSE: args.prose.split(","), CODE: args.code.split(",")})
    lengths, starts_of = [int(length) for length in args.lengths.split(",")], starts_by(args.tokenizer)
    records = Records(args.json)
    with threadpool_limits(args.threads or None):
        fitted = Fitted.on(texts)
        print(
            f"{hardware('numpy', 'scikit-learn')}; {threads}; {len(texts)} documents of {text}, vocabulary "
            f"{len(fitted.vectorizer.vocabulary_)}, d={DIMENSIONS}, k={CLUSTERS}; "
            f"tokens {'are pieces' if args.tokenizer is None else f'of {Path(args.tokenizer).name}'}; "
            f"median of {args.repeats}\n"
        )
        if args.small:
            print("little text, figures mean nothing\n")
        header("text", "tokens", "characters", "scikit-learn s", "router ms", "ratio", "stream ms",
               "stream µs/token", "largest difference")  # fmt: skip
        ratios = {
            (kind, length): compare(
                fitted, kind, documents_of(of_kind, starts_of, length, count=1)[0], args.repeats, records
            )
            for kind, of_kind in kinds.items()
            for length in lengths
        }
        print()
        routed = text if args.routed_split is None else replace(text, split=args.routed_split)
        many = documents_of(routed.texts(), starts_of, 255, args.routed_documents)
        routed_s = compare_many(fitted, many, args.peer_documents, args.repeats, records)
    print()
    for kind in kinds if not args.small else ():
        wanted, ratio = GOALS.get(kind, GOALS[PROSE]), ratios[kind, lengths[-1]]
        records.goal(f"{kind}, {lengths[-1]} tokens: >= {wanted}x scikit-learn", ratio >= wanted, f"{ratio:.0f}x")
    if not args.small:
        records.goal(f"{len(many)} documents x 255 positions < 1 s", routed_s < 1, f"{routed_s:.2f} s")


if __name__ == "__main__":
    main()
