"""Fit of the embedder against scikit-learn's TfidfVectorizer and TruncatedSVD in float64.

    python benchmarks/embedder.py [--corpus FOLDER --labels FOLDER] [--repeats 3]

Both read the same plain JSON lines within the measurement (the table has the time of reading alone), each in a process
of its own, in turns; peak memory is above the interpreter with its imports. The energy ||A V||^2 / ||A||^2 is measured
the same way for both: A is scikit-learn's matrix, our components are brought into its column order (words that we left
out get zeros), and both sets of components are made orthonormal first. With labels, balanced k-means and plain k-means
(scikit-learn) on normalise(A V) say whether clusters are as good: median NMI of three random states.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from corpora import add_text_arguments, alternate, hardware, header, limit_threads, median, row, text_of
from numpy.typing import NDArray
from records import Records, add_json_argument
from router import NumberDeletingVectorizer
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics import normalized_mutual_info_score
from sklearn.preprocessing import normalize

from cbtm.cluster.embedder import TfidfSvdEmbedder
from cbtm.cluster.kmeans import balanced_kmeans

DIMENSIONS = 100
STATES = 3
OURS, PEER, READING = "cbtm", "scikit-learn", "reading alone"


def read(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for line in lines:
            yield orjson.loads(line)


def ours(file: Path, min_document_frequency: int) -> Callable[[], Any]:
    settings = {"n_components": DIMENSIONS, "min_document_frequency": min_document_frequency, "random_state": 0}
    TfidfSvdEmbedder(n_components=2).fit(["warm imports", "imports warm here", "three texts"])

    def work() -> Any:
        embedder = TfidfSvdEmbedder(**settings).fit(read(file))
        facts = {"own energy": embedder.explained_energy_}
        return list(embedder.vocabulary_), embedder.components_, None, facts

    return work


def peer(file: Path, min_document_frequency: int) -> Callable[[], Any]:
    def work() -> Any:
        begin = time.perf_counter()
        vectorizer = NumberDeletingVectorizer(stop_words="english", min_df=min_document_frequency)
        matrix = vectorizer.fit_transform(read(file))
        between = time.perf_counter()
        svd = TruncatedSVD(DIMENSIONS, n_iter=5, random_state=0).fit(matrix)
        facts = {"tf-idf s": between - begin, "SVD s": time.perf_counter() - between}
        return vectorizer.get_feature_names_out().tolist(), svd.components_, matrix, facts

    return work


def reading(file: Path) -> Callable[[], Any]:
    return lambda: sum(map(len, read(file)))


def projection(words: list[str], found: list[str], components: NDArray[Any]) -> NDArray[np.float64]:
    """Orthonormal columns (V, d) that span `components` (d, len(found)) in the order of `words`."""
    column_of = {word: column for column, word in enumerate(words)}
    aligned = np.zeros((len(words), len(components)))
    known = [(column_of[word], index) for index, word in enumerate(found) if word in column_of]
    to, source = np.array(known).T
    aligned[to] = components.T[source]
    return np.linalg.qr(aligned)[0]


def quality(vectors: NDArray[np.float32], domains: NDArray[Any]) -> tuple[float, float]:
    """Median NMI of balanced and of plain k-means over some random states."""
    k = len(np.unique(domains))
    balanced = [balanced_kmeans(vectors, k, random_state=state).labels_ for state in range(STATES)]
    plain = [KMeans(k, n_init=4, random_state=state).fit(vectors).labels_ for state in range(STATES)]
    scores = [[normalized_mutual_info_score(domains, labels) for labels in runs] for runs in (balanced, plain)]
    return statistics.median(scores[0]), statistics.median(scores[1])


def write_texts(texts: Iterator[str], file: Path) -> tuple[int, float]:
    """Number of documents, and megabytes of text."""
    n, size = 0, 0
    with file.open("wb") as out:
        for text in texts:
            out.write(orjson.dumps(text) + b"\n")
            n, size = n + 1, size + len(text.encode())
    return n, size / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--min-document-frequency", type=int, default=1, metavar="N", help="for both")
    add_text_arguments(parser)
    add_json_argument(parser)
    args = parser.parse_args()
    threads = limit_threads(args.threads)
    text = text_of(args)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.jsonl"
        n, megabytes = write_texts(text.texts(), file)
        settings = (file, args.min_document_frequency)
        contenders = {PEER: (peer, *settings), OURS: (ours, *settings), READING: (reading, file)}
        runs = alternate(contenders, repeats=args.repeats, limit_s=args.limit)
    found = {name: median(measurements) for name, measurements in runs.items()}
    for name, run in found.items():
        if run.error:
            raise SystemExit(f"{name} failed: {run.error}")
    print(
        f"{hardware('numpy', 'scipy', 'scikit-learn')}; {threads}; {n} documents, {megabytes:.1f} MB of {text}; "
        f"d={DIMENSIONS}, words in {args.min_document_frequency} documents or more; median of {args.repeats}\n"
    )
    words, _, matrix, _ = found[PEER].value
    domains = text.labels()
    header("", "s", "CPU s", "tf-idf s", "SVD s", "ratio to scikit-learn", "peak MB", "vocabulary", "energy",
           "NMI balanced", "NMI plain")  # fmt: skip
    energies, scores, records = {}, {}, Records(args.json)
    case = f"{n:,} documents, {megabytes:.1f} MB"
    for name in (PEER, OURS):
        run = found[name]
        vectors = matrix @ projection(words, *run.value[:2])
        energies[name] = float(np.square(vectors).sum() / matrix.multiply(matrix).sum())
        unit = normalize(vectors).astype(np.float32)
        scores[name] = ("", "") if domains is None else tuple(f"{score:.3f}" for score in quality(unit, domains))
        parts = [
            f"{statistics.median(m.value[3][part] for m in runs[name]):.2f}" if part in run.value[3] else ""
            for part in ("tf-idf s", "SVD s")
        ]
        row(name, f"{run.seconds:.2f}", f"{run.cpu_seconds:.2f}", *parts, f"{found[PEER].seconds / run.seconds:.2f}",
            f"{run.peak_bytes / 1e6:.0f}", len(run.value[0]), f"{energies[name]:.5f}", *scores[name])  # fmt: skip
        note = f"energy {energies[name]:.5f}, {len(run.value[0]):,} words" + f", NMI {scores[name][0]}" * any(
            scores[name]
        )
        records.measured(case, name, runs[name], is_ours=name == OURS, note=note)
    row(READING, f"{found[READING].seconds:.2f}", f"{found[READING].cpu_seconds:.2f}", *[""] * 8)
    own = found[OURS]
    same = "equal" if own.value[0] == words else f"differ: {len(set(own.value[0]) ^ set(words))} words in one only"
    print(f"\nvocabularies: {same}; cbtm reports an energy of {own.value[3]['own energy']:.5f} itself")
    ratio, energy = found[PEER].seconds / own.seconds, energies[OURS] / energies[PEER]
    records.goal("fit >= 5x scikit-learn", ratio >= 5, f"{ratio:.2f}x")
    records.goal("energy >= 99 % of scikit-learn's", energy >= 0.99, f"{100 * energy:.2f} %")
    records.goal("peak memory < 1 GB above the interpreter", own.peak_bytes < 1e9, f"{own.peak_bytes / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
