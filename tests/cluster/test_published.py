"""Published clusterers: genuine pickles give the ids of the originals, and everything else is one clear error.

The originals are made here: a scikit-learn pipeline with the reference's vectoriser and a stand-in for its KMeans
with the same attributes, pickled by Python from modules of the same names.
"""

import collections
import hashlib
import io
import itertools
import os
import pickle
import random
import re
import subprocess
import sys
import tracemalloc
import types
import zipfile

import numpy as np
import pytest
import scipy.sparse
import torch
from published_files import (
    STOP_WORDS,
    KMeans,
    fitted_kmeans,
    fitted_pipeline,
    publish_from,
    write_published,
)
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import Normalizer

from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.published import import_clusterer
from cbtm.errors import ConfigError, DataError

PROTOCOLS = [2, 3, 4, 5]
# scikit-learn warns of the reference's own stop word, and of odd settings that are tried here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:sklearn")
SCRIPTS = ["__main__", "metaseq.scripts.train_clusterer"]


@pytest.fixture(autouse=True)
def published_from(monkeypatch):
    """Give the classes of this file the modules that they have in the reference; call it to change the script."""

    def place(script="__main__"):
        publish_from(monkeypatch, script)

    place()
    return place


@pytest.fixture(scope="module")
def texts():
    """Paragraphs of the standard library's documentation, with odd ones among them."""
    modules = ["argparse", "collections", "datetime", "decimal", "email.message", "itertools", "random", "tarfile"]
    found = []
    for module in map(__import__, modules):
        for value in [module, *vars(module).values()]:
            text = getattr(value, "__doc__", None)
            found += [part for part in text.split("\n\n") if len(part) > 60] if isinstance(text, str) else []
    odd = [
        "",
        "the and of 12 345",
        "Ärger über ÉCOLE and İstanbul Σίσυφος",
        "2nd 3rd x y z 4",
        "snake_case __init__ _x",
    ]
    return list(dict.fromkeys(found))[:120] + odd


@pytest.fixture(scope="module")
def original(texts):
    pipeline = fitted_pipeline(texts)
    return pipeline, fitted_kmeans(pipeline.transform(texts))


def written(folder, pipeline, kmeans, protocol=4):
    """Both files in `folder`, and where the clusterer is to be."""
    return *write_published(folder, pipeline, kmeans, protocol), folder / "clusterer"


def refused(folder, pipeline, kmeans):
    """The message of the import; nothing is written."""
    tfidf, kmeans, target = written(folder, pipeline, kmeans)
    with pytest.raises(DataError) as caught:
        import_clusterer(tfidf, kmeans, target)
    assert not target.exists()
    assert str(tfidf) in str(caught.value) or str(kmeans) in str(caught.value)
    return str(caught.value)


def assert_same_ids(folder, texts, pipeline, centers):
    """Documents have the cluster of the original; two centres that are equally near in float32 may be exchanged."""
    vectors = pipeline.transform(texts)
    distances = ((vectors[:, None] - np.asarray(centers, dtype=np.float64)) ** 2).sum(axis=-1)
    ids = Clusterer.load(folder).predict(texts)
    nearest = distances.min(axis=1)
    np.testing.assert_array_less(distances[np.arange(len(ids)), ids], nearest + 1e-6)
    clear = np.sort(distances, axis=1)[:, 1] > nearest + 1e-5
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(ids[clear], distances.argmin(axis=1)[clear])
    np.testing.assert_allclose(Clusterer.load(folder).embedder.transform(texts), vectors, atol=2e-6)


# --- genuine files ---


@pytest.mark.parametrize(("script", "protocol"), [*itertools.product(SCRIPTS[:1], PROTOCOLS), (SCRIPTS[1], 4)])
def test_ids_equal_those_of_the_originals(original, texts, tmp_path, published_from, script, protocol):
    published_from(script)
    pipeline, kmeans = original
    tfidf, centers, folder = written(tmp_path, pipeline, kmeans, protocol)
    facts = import_clusterer(tfidf, centers, folder)
    assert_same_ids(folder, texts, pipeline, kmeans.cluster_centers)
    vocabulary = pipeline["tfidf"].vocabulary_
    assert facts == {
        "n_clusters": 6,
        "n_components": 12,
        "words": len(vocabulary),
        "words_left_out": 0,
        "scikit_learn": sys.modules["sklearn"].__version__,
        "device": "cpu",
        "tfidf_sha256": hashlib.sha256(tfidf.read_bytes()).hexdigest(),
        "kmeans_sha256": hashlib.sha256(centers.read_bytes()).hexdigest(),
    }
    assert list(Clusterer.load(folder).embedder.vocabulary_) == sorted(vocabulary)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_centres_saved_on_a_gpu_are_read_without_one(original, texts, tmp_path, monkeypatch, protocol):
    pipeline, kmeans = original
    # What torch writes beside the bytes of a tensor that lies on a GPU.
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    files = written(tmp_path, pipeline, kmeans, protocol)
    assert b"cuda:0" in files[1].read_bytes()
    assert import_clusterer(*files)["device"] == "cuda:0"
    assert_same_ids(files[2], texts, pipeline, kmeans.cluster_centers)


def test_reading_imports_neither_torch_nor_scikit_learn_nor_pickle(original, tmp_path):
    files = written(tmp_path, *original)
    script = (
        "import sys; from pathlib import Path; from cbtm.cluster.published import import_clusterer as f;"
        f"f(*map(Path, {list(map(str, files))!r})); print(*{{'torch', 'sklearn', '_pickle'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"_pickle"}  # which NumPy imports


@pytest.mark.parametrize(
    "view",
    [
        lambda centers: torch.cat([torch.full((3, 12), 9.0), centers])[3:],  # the storage begins with other rows
        lambda centers: centers.T.contiguous().T,
        lambda centers: centers.double(),
    ],
    ids=["offset", "column-major", "float64"],
)
def test_centres_may_lie_differently_in_their_storage(original, texts, tmp_path, view):
    pipeline, kmeans = original
    centers = view(kmeans.cluster_centers)
    files = written(tmp_path, pipeline, KMeans(**vars(kmeans) | {"cluster_centers": centers}))
    import_clusterer(*files)
    np.testing.assert_array_equal(Clusterer.load(files[2]).centers, centers.float().numpy())


def test_the_dictionary_that_kmeans_save_writes_is_read_too(original, texts, tmp_path):
    pipeline, kmeans = original
    files = written(tmp_path, pipeline, vars(kmeans))
    import_clusterer(*files)
    assert_same_ids(files[2], texts, pipeline, kmeans.cluster_centers)


@pytest.mark.parametrize("layout", ["csr", "dia"])
def test_idf_of_older_versions_of_scikit_learn_is_a_diagonal_matrix(original, texts, tmp_path, layout):
    pipeline = fitted_pipeline(texts)
    transformer = pipeline["tfidf"]._tfidf
    diagonal = scipy.sparse.diags(transformer.__dict__.pop("idf_"), format=layout)
    transformer._idf_diag = getattr(scipy.sparse, f"{layout}_matrix")(diagonal)
    files = written(tmp_path, pipeline, original[1])
    import_clusterer(*files)
    assert_same_ids(files[2], texts, original[0], original[1].cluster_centers)


@pytest.mark.parametrize(
    "settings",
    [
        {"norm": None},
        {"norm": "l1"},
        {"use_idf": False},
        {"smooth_idf": False},
        {"dtype": np.float32},
        {"max_features": 300},  # columns are NumPy integers here
        {"min_df": 2, "max_df": 0.5},
        {"stop_words": ["the", "and", "#NUMBER"]},
        {"stop_words": frozenset(STOP_WORDS)},
    ],
    ids=lambda settings: str(settings)[:24],  # a set has another order in each process
)
def test_settings_that_the_embedder_can_follow_give_the_same_ids(texts, tmp_path, settings):
    # scikit-learn takes only lists since 1.2; before, a frozenset was as good.
    pipeline = fitted_pipeline(texts, **settings | {"stop_words": list(settings.get("stop_words", STOP_WORDS))})
    pipeline["tfidf"].stop_words = settings.get("stop_words", STOP_WORDS)
    kmeans = fitted_kmeans(pipeline.transform(texts))
    # Protocol 2 spells sets, bytes and NumPy integers in its own way.
    files = written(tmp_path, pipeline, kmeans, protocol=2)
    import_clusterer(*files)
    assert_same_ids(files[2], texts, pipeline, kmeans.cluster_centers)


def test_words_that_the_original_never_counts_are_left_out(texts, tmp_path):
    never = ["the", "2nd", "x", "École", "two words", "#NUMBER"]  # a stop word, a number, too short, not a lower word
    found = fitted_pipeline(texts)["tfidf"].vocabulary_
    pipeline = fitted_pipeline(texts, vocabulary=sorted(found) + never)
    kmeans = fitted_kmeans(pipeline.transform(texts))
    files = written(tmp_path, pipeline, kmeans)
    facts = import_clusterer(*files)
    assert (facts["words"], facts["words_left_out"]) == (len(found), 6)
    assert_same_ids(files[2], texts, pipeline, kmeans.cluster_centers)


def test_a_fitted_random_state_is_no_obstacle_where_it_is_a_number(texts, tmp_path, original):
    pipeline = fitted_pipeline(texts, svd=TruncatedSVD(12, random_state=7, algorithm="arpack"))
    import_clusterer(*written(tmp_path, pipeline, original[1]))


# --- settings that cannot be followed ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sublinear_tf": True}, "has sublinear_tf=True, and cbtm's embedder is sublinear_tf=False only"),
        ({"binary": True}, "has binary=True"),
        ({"lowercase": False}, "has lowercase=False"),
        ({"ngram_range": (1, 2)}, "has ngram_range=(1, 2), and cbtm's embedder is ngram_range=(1, 1) only"),
        ({"token_pattern": r"\w+"}, r"has token_pattern='\\w+'"),
        ({"strip_accents": "ascii"}, "has strip_accents='ascii'"),
        ({"analyzer": "char"}, "has analyzer='char'"),
        ({"stop_words": ["the"]}, "numbers count as a word here (#NUMBER is no stop word)"),
        ({"stop_words": None}, "numbers count as a word here"),
        ({"normalizer": Normalizer("l1")}, "the normaliser has norm='l1', and cbtm's embedder is norm='l2' only"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_that_would_change_a_vector_are_refused(original, texts, tmp_path, settings, message):
    found = refused(tmp_path, fitted_pipeline(texts, **settings), original[1])
    assert message in found
    assert "fit a clusterer with cbtm instead" in found


def test_another_distance_is_refused(original, tmp_path):
    pipeline, kmeans = original
    message = refused(tmp_path, pipeline, KMeans(**vars(kmeans) | {"distance": "cosine"}))
    assert "k-means has distance='cosine', and cbtm's is 'euclidean' only" in message


# --- wrong files ---


def test_exchanged_files_are_noticed(original, tmp_path):
    pipeline, kmeans = original
    message = refused(tmp_path, kmeans, pipeline)
    assert "tfidf.pkl holds a kmeans_pytorch.KMeans, not a tf-idf pipeline; are the two files exchanged?" in message
    message = refused(tmp_path, pipeline, pipeline)
    assert "kmeans.pkl holds a sklearn.pipeline.Pipeline, not k-means; are the two files exchanged?" in message


def test_files_of_different_clusterers_are_noticed(original, texts, tmp_path):
    pipeline = fitted_pipeline(texts, svd=TruncatedSVD(7, random_state=0))
    message = refused(tmp_path, pipeline, original[1])
    assert "centres have 12 components, but the SVD of" in message
    assert "has 7; give two files of the same clusterer" in message


def test_a_missing_file_is_named(original, tmp_path):
    tfidf, kmeans, folder = written(tmp_path, *original)
    kmeans.unlink()
    with pytest.raises(DataError, match=r"kmeans.pkl cannot be read: .*No such file.*; check the path"):
        import_clusterer(tfidf, kmeans, folder)


def test_a_folder_that_holds_something_is_left_alone(original, tmp_path):
    tfidf, kmeans, folder = written(tmp_path, *original)
    folder.mkdir()
    import_clusterer(tfidf, kmeans, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="clusterer is not an empty folder; name another, or remove it first"):
        import_clusterer(tfidf, kmeans, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["tfidf"].__dict__.pop("vocabulary_"), "vocabulary_ is None; was the pipeline fitted?"),
        (lambda p: p["tfidf"].__dict__.pop("token_pattern"), "the vectoriser has no attribute token_pattern"),
        (lambda p: p["tfidf"].__dict__.pop("_tfidf"), "_tfidf of the vectoriser is None, not a sklearn.feature_extr"),
        (lambda p: p["tfidf"]._tfidf.__dict__.pop("idf_"), "has neither idf_ nor _idf_diag; was the pipeline fitted?"),
        (lambda p: p["svd"].__dict__.pop("components_"), "components_ is None, not an array"),
        (lambda p: p["normalizer"].__dict__.pop("norm"), "the normaliser has no attribute norm"),
        (lambda p: p.steps.pop(), "the pipeline has a list of 2 for steps"),
        (lambda p: p.steps.reverse(), "the first step of the pipeline is a sklearn.preprocessing._data.Normalizer"),
        (lambda p: p["tfidf"].vocabulary_.popitem(), "does not number its"),
        (lambda p: p["tfidf"].vocabulary_.update(parser=0), "does not number its"),
        (lambda p: p["tfidf"].vocabulary_.update(parser=10**9), "does not number its"),
        (lambda p: p["tfidf"].vocabulary_.update(parser=-1), "does not number its"),
        (lambda p: p["tfidf"].vocabulary_.update(parser="1"), "a column of vocabulary_ is '1', not an integer"),
        (lambda p: p["tfidf"].__setattr__("stop_words", 7), "stop_words is 7, not a list of words"),
        (lambda p: p["tfidf"].__setattr__("stop_words", [7]), "stop_words has a member that is not a text"),
        (lambda p: p["svd"].components_.fill(np.nan), "components_ has a NaN or a number beyond 1e+06"),
        (lambda p: p["svd"].components_.fill(1e300), "components_ has a NaN or a number beyond 1e+06"),
        (lambda p: p["svd"].__setattr__("components_", p["svd"].components_[:0]), "do not belong together"),
        (lambda p: p["svd"].__setattr__("components_", np.zeros((2, 3), "i8")), "components_ holds int64, not floats"),
        (lambda p: p["svd"].__setattr__("components_", np.zeros(3, "c16")), "elements of type 'c16', not one of f4"),
        (lambda p: p["svd"].__setattr__("components_", np.array([None])), "has elements of type 'O8', not one of"),
    ],
    ids=itertools.count(),
)
def test_a_pipeline_that_lacks_something_is_refused(original, texts, tmp_path, change, message):
    pipeline = fitted_pipeline(texts)
    change(pipeline)
    assert message in refused(tmp_path, pipeline, original[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster_centers": None}, "k-means has no centres; it was saved before it was fitted"),
        ({"cluster_centers": [1.0]}, "cluster_centers is a list of 1, not a torch tensor"),
        ({"cluster_centers": torch.zeros(6)}, "centres of shape (6,) for n_clusters=6"),
        ({"cluster_centers": torch.zeros(2, 3, 4)}, "cluster_centers has (2, 3, 4) where a shape"),
        ({"cluster_centers": torch.full((6, 12), torch.nan)}, "cluster_centers has a NaN"),
        ({"cluster_centers": torch.zeros(6, 12, dtype=torch.int64)}, "uses torch.LongStorage"),
        ({"cluster_centers": torch.zeros(1, 12).expand(6, 12)}, "has shape (6, 12), strides (0, 1) and offset 0 in a"),
        ({"n_clusters": 7}, "centres of shape (6, 12) for n_clusters=7"),
        ({"n_clusters": None}, "n_clusters of k-means is None, not an integer"),
    ],
    ids=itertools.count(),
)
def test_a_kmeans_that_lacks_something_is_refused(original, tmp_path, changes, message):
    pipeline, kmeans = original
    assert message in refused(tmp_path, pipeline, KMeans(**vars(kmeans) | changes))


def test_a_kmeans_without_centres_is_refused(original, tmp_path):
    assert "k-means has no attribute cluster_centers" in refused(tmp_path, original[0], KMeans(n_clusters=6))
    assert "the file is a list of 1, not a kmeans_pytorch.KMeans" in refused(tmp_path, original[0], [6])


def test_files_of_other_kinds_are_refused(original, tmp_path):
    pipeline, kmeans = original
    assert "tfidf.pkl: byte 0 of 0: the file begins with b''" in refused(tmp_path, b"", kmeans)
    message = refused(tmp_path, b"version https://git-lfs.github.com/spec/v1\n", kmeans)
    assert "begins with b've', which is no pickle of protocol 2 to 5" in message
    torch.save(vars(kmeans), tmp_path / "saved.pt")
    message = refused(tmp_path, pipeline, (tmp_path / "saved.pt").read_bytes())
    assert "kmeans.pkl is a zip archive (perhaps of torch.save)" in message
    message = refused(tmp_path, pickle.dumps(pipeline) + b"more", kmeans)
    assert "4 bytes follow the pickle" in message


def test_a_file_that_is_too_large_is_refused_unread(original, tmp_path, monkeypatch):
    monkeypatch.setattr("cbtm.cluster.published._LARGEST_FILE", 1000)
    assert re.search(r"tfidf.pkl: \d+ bytes, above the limit of 1000", refused(tmp_path, *original))


# --- hostile and damaged files ---


class Calls:
    """Pickled, it asks for a call, and for a state of the result."""

    def __init__(self, function, *arguments, state=None):
        self.wanted = function, arguments, state

    def __reduce__(self):
        return self.wanted


class SetsState:
    """Pickled in the place of a class that runs its state."""

    def __reduce__(self):
        return types.SimpleNamespace, (), {"__setstate__": os.system}


@pytest.mark.parametrize("place", ["pipeline.memory", "svd.components_", "tfidf.stop_words", "kmeans.device"])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Calls(os.system, "touch hacked"), f"{os.system.__module__}.system"),
        (Calls(eval, "open('hacked', 'w')"), "eval"),
        (Calls(getattr, Calls(__import__, "os"), "system"), "getattr"),
        (Calls(Calls, Calls(os.system, "touch hacked")), "Calls"),
        (SetsState(), "types.SimpleNamespace"),
        (Calls(np.load, "hacked"), "numpy.load"),
        (Calls(torch.load, "hacked"), "torch.serialization.load"),
        (Calls(np.memmap, "hacked"), "numpy.memmap"),
        (Calls(collections.deque), "collections.deque"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_names_are_refused_and_not_run(original, tmp_path, monkeypatch, place, value, name):
    monkeypatch.chdir(tmp_path)
    pipeline, kmeans = pickle.loads(pickle.dumps(original))
    owner, attribute = place.split(".")
    owners = {"pipeline": pipeline, "svd": pipeline["svd"], "tfidf": pipeline["tfidf"], "kmeans": kmeans}
    setattr(owners[owner], attribute, value)
    message = refused(tmp_path / "files", pipeline, kmeans)
    assert name in message
    assert "it was not run, do not trust this file" in message
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


RECONSTRUCT, DTYPE = np.zeros(0).__reduce__()[0], np.dtype


def array_record(shape, raw, dtype="f8", is_fortran=False):
    return Calls(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, shape, np.dtype(dtype), is_fortran, raw))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (array_record((10**12,), b"\0" * 8), "components_ has 8 bytes for shape (1000000000000,) of float64"),
        (array_record((10**6, 10**6), b""), "components_ has 0 bytes for shape (1000000, 1000000)"),
        (array_record((2**62, 4), b""), "components_ has 0 bytes for shape (4611686018427387904, 4)"),
        (array_record((-1, 8), b"\0" * 8), "has (-1, 8) where a shape, strides or an offset belong"),
        (array_record((2**70,), b"\0" * 8), "where a shape, strides or an offset belong"),
        (array_record((1,) * 1000, b"\0" * 8), "has a tuple of 1000 where a shape"),
        (array_record((0, 10**12), b""), "do not belong together"),
        (array_record(7, b""), "has 7 where a shape"),
        (array_record((1,), "text"), "components_ has 'text' for its bytes"),
        (array_record((1,), b"\0" * 8, dtype="V8"), "has elements of type 'V8'"),
        (array_record((1,), [Calls(RECONSTRUCT, np.ndarray, (10**12,), b"b")]), "has a list of 1 for its bytes"),
        (Calls(RECONSTRUCT, np.ndarray, (10**12,), b"b"), "components_ is a numpy._core.multiarray._reconstruct"),
        (Calls(np.ndarray, (10**12,)), "components_ is a numpy.ndarray, not an array"),
        (Calls(np.dtype, "f8", state=(3, "<", None, None, None, -1, -1, 0)), "components_ is a numpy.dtype"),
    ],
    ids=itertools.count(),
)
def test_an_array_is_never_larger_than_its_bytes(original, tmp_path, array, message):
    pipeline, kmeans = pickle.loads(pickle.dumps(original))
    pipeline["svd"].components_ = array
    content = pickle.dumps(pipeline)
    tracemalloc.start()
    assert message in refused(tmp_path, content, kmeans)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000


def storage_bytes():
    """A pickled storage of the numbers 0 to 71: five pickles, the count, the numbers."""
    storage = torch.arange(72.0).__reduce_ex__(4)[1][0]
    return storage.__reduce__()[1][0]


def tensor_record(blob, offset=0, shape=(6, 12), strides=(12, 1)):
    return Calls(
        torch._utils._rebuild_tensor_v2,
        Calls(torch.storage._load_from_bytes, blob),
        offset,
        shape,
        strides,
        False,
        collections.OrderedDict(),
    )


def with_storage(change):
    return lambda: tensor_record(change(storage_bytes()))


def zip_bomb(_):
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (with_storage(zip_bomb), "the tensor is a zip archive"),
        (with_storage(lambda blob: blob[:-1]), "announces 72 numbers of float32 and holds 287 bytes"),
        (with_storage(lambda blob: blob + b"\0" * 4), "announces 72 numbers of float32 and holds 292 bytes"),
        (
            with_storage(lambda blob: blob.replace(b"cpuq\x03K\x48", b"cpuq\x03J\xff\xff\xff\x7f")),
            "announces 2147483647 n",
        ),
        (
            with_storage(lambda blob: blob.replace(b"FloatStorage", b"DoubleStorage")),
            "72 numbers of float64 and holds 288",
        ),
        (with_storage(lambda blob: blob.replace(b"torch\nFloatStorage", b"posix\nsystem")), "uses posix.system"),
        (
            with_storage(lambda blob: blob.replace(b"\x6c\xfc\x9c", b"\x6c\xfc\x9d")),
            "does not begin like a little-endian",
        ),
        (
            with_storage(lambda blob: blob.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")),
            "little-endian",
        ),
        (with_storage(lambda blob: b""), "begins with b''"),
        (with_storage(lambda blob: "text"), "cluster_centers has 'text' for its bytes"),
        (lambda: tensor_record(storage_bytes(), offset=1), "and offset 1 in a storage of 72 numbers"),
        (lambda: tensor_record(storage_bytes(), offset=-1), "has (-1,) where a shape, strides or an offset belong"),
        (lambda: tensor_record(storage_bytes(), shape=(10**12, 12), strides=(0, 0)), "has shape (1000000000000, 12)"),
        (lambda: tensor_record(storage_bytes(), shape=(10**9, 10**9)), "has shape (1000000000, 1000000000)"),
        (lambda: tensor_record(storage_bytes(), strides=(12, 2)), "strides (12, 2)"),
        (lambda: tensor_record(storage_bytes(), strides=(12,)), "strides (12,)"),
        (lambda: tensor_record(storage_bytes(), shape="612"), "has '612' where a shape"),
    ],
    ids=itertools.count(),
)
def test_a_tensor_is_never_larger_than_its_bytes(original, tmp_path, tensor, message):
    pipeline, kmeans = original
    content = pickle.dumps(KMeans(**vars(kmeans) | {"cluster_centers": tensor()}))
    tracemalloc.start()
    assert message in refused(tmp_path, pipeline, content)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000


def test_the_records_of_these_tests_are_genuine_when_they_are_not_changed(original, tmp_path):
    pipeline, kmeans = original
    components = pipeline["svd"].components_
    copy, _ = pickle.loads(pickle.dumps(original))
    copy["svd"].components_ = array_record(components.shape, components.tobytes())
    files = written(tmp_path, copy, KMeans(**vars(kmeans) | {"cluster_centers": tensor_record(storage_bytes())}))
    import_clusterer(*files)
    found = Clusterer.load(files[2])
    np.testing.assert_array_equal(found.embedder.components_, components.astype(np.float32))
    np.testing.assert_array_equal(found.centers, np.arange(72).reshape(6, 12))


@pytest.mark.parametrize("which", [0, 1])
def test_a_truncated_file_is_refused_wherever_it_ends(original, tmp_path, which):
    whole = [pickle.dumps(value) for value in original]
    for part in range(20):
        cut = list(whole)
        cut[which] = cut[which][: len(cut[which]) * part // 20]
        message = refused(tmp_path, *cut)
        assert ["tfidf.pkl", "kmeans.pkl"][which] in message
        assert part == 0 or "cut short" in message


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("protocol", [2, 5])
def test_flipped_bits_give_a_clear_error_or_a_clusterer(original, texts, tmp_path, which, protocol):
    kmeans = original[1]
    # Few texts: then a good part of the bits are structure.
    files = written(tmp_path, fitted_pipeline(texts[:30]), kmeans, protocol)
    rng, n_read, messages = random.Random(protocol), 0, []
    for attempt in range(80):
        damaged = bytearray(files[which].read_bytes())
        for _ in range(rng.choice([1, 1, 5])):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        pair = [*files[:2]]
        pair[which] = tmp_path / "damaged.pkl"
        pair[which].write_bytes(damaged)
        try:
            import_clusterer(*pair, tmp_path / f"clusterer{attempt}")
            n_read += 1
        except DataError as error:
            messages.append(str(error))
    assert all("damaged.pkl" in message for message in messages)
    assert len(messages) > 10
    assert n_read > 10
