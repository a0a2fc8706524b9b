"""Prefix routing against scikit-learn, which vectorises every prefix anew.

    python benchmarks/router.py [--repeats 3] [--documents 800]

Text: docstrings of the installed numpy, scipy and scikit-learn, joined until a document is long enough. Tokens: pieces
of at most five letters or four other signs with the space before them, or runs of white space; the table tells how
many characters they make. Both sides get the same clusterer (tf-idf without stop words and numbers, SVD to 100
dimensions, k-means) and the same prefixes as character offsets; decoding tokens to text is counted for neither.
They take turns within one run; the table has the median of each and the largest difference between the distances.
"""

import argparse
import ast
import importlib.util
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import sklearn
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.preprocessing import normalize

from cbtm.merge.router import PrefixRouter

DIMENSIONS = 100
CLUSTERS = 8
TOKEN = re.compile(r" ?[^\W_]{1,5}| ?[^\w\s]{1,4}|_|\s+")


class NumberDeletingVectorizer(TfidfVectorizer):
    """Words that begin with a digit are no terms."""

    def build_tokenizer(self) -> Callable[[str], list[str]]:
        tokenize = super().build_tokenizer()
        return lambda text: [word for word in tokenize(text) if not word[0].isdigit()]


def docstrings(package: str) -> Iterator[str]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the benchmark takes its text from the package {package}, which is not installed")
    for path in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes in other people's sources
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    yield text


def documents_of(texts: list[str], n_tokens: int, count: int) -> list[tuple[str, NDArray[np.int64]]]:
    """`count` documents of `n_tokens` tokens with the offset at which each token starts; texts are used in turn."""
    documents: list[tuple[str, NDArray[np.int64]]] = []
    parts: list[str] = []
    size = 0
    while len(documents) < count:
        for text in texts:
            parts.append(text)
            size += len(text)
            if size < 6 * n_tokens:
                continue
            document = "\n\n".join(parts)
            starts = [match.start() for match in TOKEN.finditer(document)][:n_tokens]
            documents.append((document, np.array(starts)))
            parts, size = [], 0
            if len(documents) == count:
                break
    return documents


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--documents", type=int, default=800)
    args = parser.parse_args()

    texts = [text for package in ("numpy", "scipy", "sklearn") for text in docstrings(package)]
    np.random.default_rng(0).shuffle(texts)
    vectorizer = NumberDeletingVectorizer(stop_words="english").fit(texts)
    vectors = vectorizer.transform(texts)
    svd = TruncatedSVD(DIMENSIONS, random_state=0).fit(vectors)
    kmeans = KMeans(CLUSTERS, n_init=1, random_state=0).fit(normalize(svd.transform(vectors)))
    word_vectors = (vectorizer.idf_[:, np.newaxis] * svd.components_.T).astype(np.float32)
    router = PrefixRouter(vectorizer.vocabulary_, word_vectors, kmeans.cluster_centers_)

    def vectorise_every_prefix(text: str, starts: NDArray[np.int64]) -> NDArray[np.float64]:
        embeddings = normalize(svd.transform(vectorizer.transform([text[:start] for start in starts])))
        distances: NDArray[np.float64] = euclidean_distances(embeddings, kmeans.cluster_centers_)
        return distances

    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"numpy {np.__version__}, scikit-learn {sklearn.__version__}; {len(texts)} docstrings, "
        f"vocabulary {len(vectorizer.vocabulary_)}, d={DIMENSIONS}, k={CLUSTERS}, median of {args.repeats}\n"
    )
    print("| tokens | characters | scikit-learn s | router ms | ratio | largest difference |")
    print("|--|--|--|--|--|--|")
    for n_tokens in (256, 512, 1024, 2048):
        ((text, starts),) = documents_of(texts, n_tokens, count=1)
        difference = np.abs(vectorise_every_prefix(text, starts) - router.distances(text, starts)).max()
        peer, ours = [], []
        for _ in range(args.repeats):
            peer.append(seconds(lambda: vectorise_every_prefix(text, starts)))  # noqa: B023 - called at once
            ours.append(seconds(lambda: router.distances(text, starts)))  # noqa: B023
        peer_s, ours_s = statistics.median(peer), statistics.median(ours)
        print(
            f"| {len(starts)} | {starts[-1]} | {peer_s:.3f} | {ours_s * 1e3:.2f} "
            f"| {peer_s / ours_s:.0f} | {difference:.1e} |"
        )

    documents = documents_of(texts, 255, args.documents)
    total = statistics.median(
        seconds(lambda: [router.distances(text, starts) for text, starts in documents]) for _ in range(args.repeats)
    )
    positions = sum(len(starts) for _, starts in documents)
    print(f"\n{len(documents)} documents, {positions} positions: {total:.2f} s, {positions / total:,.0f} positions/s")


if __name__ == "__main__":
    main()
