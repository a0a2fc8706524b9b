"""Assignment of JSON lines to clusters against scikit-learn's transform and predict, with the same model.

    python benchmarks/assigner.py [--corpus FOLDER] [--fit-documents 20000] [--repeats 3]
    python benchmarks/assigner.py --memory --corpus FOLDER

The model is fitted once by scikit-learn (tf-idf without stop words and numbers, SVD, k-means, float64); cbtm gets its
words, weights, components and centres. JSON lines in, ids out: every contender reads the same plain file, parses it
with orjson and returns the cluster of each document, which is compared with scikit-learn's. All use one thread, each
in a process of its own, in turns. Besides scikit-learn (10,000 documents at once) stand three other tokenisers, each
with the same sum of word vectors: the Rust library tokenizers as a word tokeniser, pyarrow's RE2, and Python's re. The
words of the first two are not exactly Python's for all of Unicode, which would show as ids that differ.

With --memory: the peak size of a process that assigns one shard, the largest, against four: lines and token shards
written, with bytes for tokens.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from corpora import (
    Text,
    add_text_arguments,
    alternate,
    hardware,
    header,
    limit_threads,
    measure,
    median,
    row,
    text_of,
)
from numpy.typing import NDArray
from records import Records, add_json_argument
from router import NumberDeletingVectorizer
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import normalize

from cbtm.cluster.assigner import AssignConfig, assign_group
from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.embedder import TfidfSvdEmbedder
from cbtm.corpus import CorpusConfig, shard_of
from cbtm.plan import PlannedFile, ShardGroup

BLOCK, PEER_BLOCK = 1_000, 10_000  # documents at once
NO_WORD = r"[^\p{L}\p{N}_]+"  # what Python's \W+ is, nearly, for engines whose \w is not Python's
OURS, PEER, FLOOR = "cbtm", "scikit-learn", "orjson.loads alone"
Model = tuple[NumberDeletingVectorizer, TruncatedSVD, KMeans]


def fit(texts: list[str], dimensions: int, clusters: int) -> Model:
    vectorizer = NumberDeletingVectorizer(stop_words="english").fit(texts)
    matrix = vectorizer.transform(texts)
    svd = TruncatedSVD(dimensions, random_state=0).fit(matrix)
    return vectorizer, svd, KMeans(clusters, n_init=1, random_state=0).fit(normalize(svd.transform(matrix)))


def save(model: Model, folder: Path) -> None:
    """The model as words and arrays, for all but scikit-learn."""
    vectorizer, svd, kmeans = model
    words = vectorizer.get_feature_names_out().tolist()
    (folder / "words.json").write_text(json.dumps(words), encoding="utf-8")
    np.savez(folder / "arrays.npz", idf=vectorizer.idf_, components=svd.components_, centers=kmeans.cluster_centers_)


def load(folder: Path) -> tuple[list[str], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Words, idf (V,), components (d, V) and centres (k, d)."""
    words = json.loads((folder / "words.json").read_text(encoding="utf-8"))
    with np.load(folder / "arrays.npz") as arrays:
        idf, components, centers = (arrays[name].astype(np.float32) for name in ("idf", "components", "centers"))
    return words, idf, components, centers


def blocks(file: Path, size: int) -> Iterator[list[str]]:
    """Texts of the file, parsed, `size` at once."""
    with file.open("rb") as lines:
        while block := [orjson.loads(line)["text"] for line in islice(lines, size)]:
            yield block


def clusterer_of(folder: Path) -> Clusterer:
    words, idf, components, centers = load(folder)
    return Clusterer(TfidfSvdEmbedder.from_arrays(words, idf, components), centers)


def ours(file: Path, folder: Path) -> Callable[[], Any]:
    clusterer = clusterer_of(folder)
    clusterer.predict(["imports, once"])
    return lambda: np.concatenate([clusterer.predict(block) for block in blocks(file, BLOCK)])


def peer(file: Path, model: Model) -> Callable[[], Any]:
    vectorizer, svd, kmeans = model

    def work() -> Any:
        return np.concatenate(
            [
                kmeans.predict(normalize(svd.transform(vectorizer.transform(block))))
                for block in blocks(file, PEER_BLOCK)
            ]
        )

    return work


def floor(file: Path) -> Callable[[], Any]:
    def work() -> Any:
        for _ in blocks(file, BLOCK):
            pass

    return work


class GatherSum:
    """Ids from the vocabulary columns of the words of a block: the sum of their vectors, then the nearest centre."""

    def __init__(self, folder: Path) -> None:
        self.words, idf, components, centers = load(folder)
        # One more word, the unknown one, adds nothing.
        self._word_vectors = np.concatenate([(components * idf).T, np.zeros((1, len(components)), dtype=np.float32)])
        self._centers, self._squares = centers, np.square(centers).sum(axis=1)

    def ids(self, columns: NDArray[np.int32], offsets: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Cluster of each document, whose words are columns[offsets[i] : offsets[i + 1]]."""
        ones = np.ones(len(columns), dtype=np.float32)
        shape = (len(offsets) - 1, len(self._word_vectors))
        vectors = csr_matrix((ones, columns, offsets), shape=shape) @ self._word_vectors
        # |v / |v| - c|^2, times |v|, without what is the same for all centres; a zero vector has length 1.
        lengths = np.linalg.norm(vectors, axis=1)
        lengths[lengths == 0] = 1
        return (lengths[:, None] * self._squares - 2 * vectors @ self._centers.T).argmin(axis=1)


def rust_tokenizers(file: Path, folder: Path) -> Callable[[], Any]:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    model = GatherSum(folder)
    vocabulary = {word: column for column, word in enumerate([*model.words, "<unknown>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(NO_WORD), behavior="removed")
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)

    def work() -> Any:
        found = []
        for block in blocks(file, BLOCK):
            rows = [encoding.ids for encoding in encode(block, add_special_tokens=False)]
            offsets = np.cumsum([0, *map(len, rows)])
            columns = np.fromiter((column for ids in rows for column in ids), dtype=np.int32, count=offsets[-1])
            found.append(model.ids(columns, offsets))
        return np.concatenate(found)

    return work


def arrow(file: Path, folder: Path) -> Callable[[], Any]:
    import pyarrow as pa
    import pyarrow.compute as pc

    pa.set_cpu_count(1)
    model = GatherSum(folder)
    vocabulary = pa.array(model.words)
    unknown = pa.scalar(len(model.words), pa.int32())

    def work() -> Any:
        found = []
        for block in blocks(file, BLOCK):
            split = pc.split_pattern_regex(pc.utf8_lower(pa.array(block)), pattern=NO_WORD)
            distinct = split.values.dictionary_encode()
            columns = pc.fill_null(pc.index_in(distinct.dictionary, value_set=vocabulary), unknown)
            found.append(model.ids(columns.take(distinct.indices).to_numpy(), split.offsets.to_numpy()))
        return np.concatenate(found)

    return work


def python_re(file: Path, folder: Path) -> Callable[[], Any]:
    import re

    model = GatherSum(folder)
    column_of = {word: column for column, word in enumerate(model.words)}.get
    find = re.compile(r"\w\w+").findall

    def work() -> Any:
        found = []
        for block in blocks(file, BLOCK):
            rows = [[c for c in map(column_of, find(text.lower())) if c is not None] for text in block]
            offsets = np.cumsum([0, *map(len, rows)])
            columns = np.fromiter((column for row_ in rows for column in row_), dtype=np.int32, count=offsets[-1])
            found.append(model.ids(columns, offsets))
        return np.concatenate(found)

    return work


class Bytes:
    """An encoder as fast as can be: one token for each byte."""

    vocab_size = 256

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]


def assign_files(root: str, paths: list[str], folder: Path) -> Callable[[], Any]:
    """The assigner's own function on a group of files, with bytes for tokens."""
    clusterer = clusterer_of(folder)
    clusterer.predict(["imports, once"])
    files = tuple(PlannedFile(path=path, size=0, version="", digest=path) for path in paths)
    group = ShardGroup(name="train-00000", part="train", split=paths[0].split("/")[0], files=files)

    def work() -> Any:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            out, parts = Path(made, "out"), Path(made, "parts")
            tools = (clusterer, Bytes())
            facts = assign_group(AssignConfig(), CorpusConfig(root=root), group, lambda: tools, out, scratch=parts)
        return facts["documents"]

    return work


def compare_memory(text: Text, folder: Path, limit_s: float, records: Records) -> None:
    shards: dict[str, list[str]] = {}
    for path in text.files():
        shards.setdefault(shard_of(path, text.split), []).append(path)
    if len(shards) < 2:
        raise SystemExit(f"{text} has one shard; the memory of an assigner is compared between one and four")
    size = {shard: sum((Path(str(text.root)) / path).stat().st_size for path in shards[shard]) for shard in shards}
    largest_first = sorted(shards, key=lambda shard: -size[shard])
    header("shards", "documents", "s", "peak MB", "above the model's MB")
    peaks = {}
    for n in (1, min(4, len(shards))):
        paths = [path for shard in largest_first[:n] for path in shards[shard]]
        run = measure(assign_files, str(text.root), paths, folder, limit_s=limit_s)
        if run.error:
            raise SystemExit(f"assignment of {n} shards failed: {run.error}")
        peaks[n] = run.peak_total_bytes
        row(n, run.value, f"{run.seconds:.2f}", f"{run.peak_total_bytes / 1e6:.1f}", f"{run.peak_bytes / 1e6:.1f}")
        # Whole processes: what the model and the interpreter take is the same for both.
        case, note = "memory of a whole process", f"{run.value:,} documents"
        records.add(
            case, f"cbtm, {n} shard{'s' * (n > 1)}", "MB", [run.peak_total_bytes / 1e6], is_ours=n == 1, note=note
        )
    most = max(peaks)
    growth = peaks[most] / peaks[1]
    print()
    if most < 4:
        print(f"{text} has only {most} shards")
    records.goal(f"memory flat from one shard to {most}, within 5 %", growth <= 1.05, f"{growth:.3f}")


def compare_speed(text: Text, model: Model, folder: Path, args: argparse.Namespace, records: Records) -> None:
    file = folder / "documents.jsonl"
    n = 0
    with file.open("wb") as out:
        for n, document in enumerate(text.texts(), start=1):
            out.write(orjson.dumps({"text": document, "id": n}) + b"\n")
    megabytes = file.stat().st_size / 1e6
    contenders = {
        PEER: (peer, file, model),
        OURS: (ours, file, folder),
        "tokenizers (Rust)": (rust_tokenizers, file, folder),
        "pyarrow (RE2)": (arrow, file, folder),
        "Python re": (python_re, file, folder),
        FLOOR: (floor, file),
    }
    runs = alternate(contenders, repeats=args.repeats, limit_s=args.limit)
    found = {name: median(of_one) for name, of_one in runs.items()}
    case = f"{n:,} documents, {megabytes:.1f} MB"
    expected, own = found[PEER], found[OURS]
    print(f"{n} documents, {megabytes:.1f} MB of JSON lines; median of {args.repeats}\n")
    header("", "s", "CPU s", "documents/s", "MB/s", "ratio to scikit-learn", "ids that differ")
    for name, run in found.items():
        if run.error:
            row(name, "failed: " + run.error, *[""] * 5)
            records.measured(case, name, runs[name], unit="MB/s")
            continue
        differ = "" if run.value is None or expected.error else int((run.value != expected.value).sum())
        row(name, f"{run.seconds:.2f}", f"{run.cpu_seconds:.2f}", f"{n / run.seconds:,.0f}",
            f"{megabytes / run.seconds:.1f}", f"{expected.seconds / run.seconds:.2f}", differ)  # fmt: skip
        note = "" if differ == "" else f"{differ} ids differ"
        records.measured(
            case,
            name,
            runs[name],
            unit="MB/s",
            value=lambda run: megabytes / run.seconds,
            is_ours=name == OURS,
            note=note,
        )
    print()
    for least in (4, 15):
        ratio = expected.seconds / own.seconds
        records.goal(
            f">= {least}x scikit-learn on one core", ratio >= least, own.error or expected.error or f"{ratio:.2f}x"
        )
    failed = own.error or expected.error
    n_differ = n if failed else int((own.value != expected.value).sum())
    records.goal("ids equal to scikit-learn's", n_differ == 0, failed or f"{n_differ} of {n} differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit-documents", type=int, default=20_000, metavar="N", help="the model is fitted on so many")
    parser.add_argument("--dimensions", type=int, default=100)
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--memory", action="store_true", help="peak memory for one shard and for four, no speed")
    add_text_arguments(parser)
    add_json_argument(parser)
    args = parser.parse_args()
    threads = limit_threads(args.threads)
    text = text_of(args)
    model = fit(list(islice(text.texts(), args.fit_documents)), args.dimensions, args.clusters)
    print(
        f"{hardware('numpy', 'scikit-learn', 'orjson', 'tokenizers', 'pyarrow')}; {threads}; {text}; "
        f"vocabulary {len(model[0].vocabulary_)}, d={args.dimensions}, k={args.clusters}"
    )
    records = Records(args.json)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(model, folder)
        if args.memory:
            compare_memory(text, folder, args.limit, records)
        else:
            compare_speed(text, model, folder, args, records)


if __name__ == "__main__":
    main()
