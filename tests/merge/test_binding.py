import json
import re

import pytest

from cbtm import storage
from cbtm.cluster.clusterer import Ancestor
from cbtm.errors import ManifestError
from cbtm.merge.binding import check_experts, read_expert

CLUSTERER = "c" * 64
FACTS = {"format": 1, "kind": "expert", "clusterer_digest": CLUSTERER, "tokenizer_digest": "t" * 64}


def write(root, name, **facts):
    """A trained expert, as far as it says what it is; gives its folder or prefix."""
    folder = storage.join(root, name)
    storage.write_bytes(storage.join(folder, "expert.json"), json.dumps(FACTS | facts).encode())
    return folder


def experts(root, **changes):
    """Experts of clusters 0, 3 and 11, by cluster; `changes` are those of cluster 3."""
    return {
        0: write(root, "cluster-00000", cluster=0),
        3: write(root, "cluster-00003", **({"cluster": 3} | changes)),
        11: write(root, "cluster-00011", cluster=11),
    }


def test_experts_of_their_clusters_pass(root):
    check_experts(experts(root), clusterer_digest=CLUSTERER)
    check_experts({}, clusterer_digest=CLUSTERER)


def test_what_an_expert_says_of_itself_is_read(root):
    folder = write(root, "cluster-00003", cluster=3, steps=20)
    assert read_expert(folder) == FACTS | {"cluster": 3, "steps": 20}


def test_expert_that_is_not_there_is_named(root):
    roots = experts(root) | {3: storage.join(root, "cluster-00007")}
    message = f"{storage.join(root, 'cluster-00007', 'expert.json')} is not there: {roots[3]} is no trained expert"
    with pytest.raises(ManifestError, match=re.escape(message)):
        check_experts(roots, clusterer_digest=CLUSTERER)


def test_one_expert_in_two_folders_is_refused(root):
    # The files of cluster 0 copied over those of cluster 3.
    roots = experts(root, cluster=0)
    message = f"{roots[3]} is the expert of cluster 0, not of 3: weights would go to the wrong expert; put its files"
    with pytest.raises(ManifestError, match=re.escape(message)):
        check_experts(roots, clusterer_digest=CLUSTERER)


def test_one_folder_for_two_clusters_is_refused(root):
    roots = experts(root)
    with pytest.raises(ManifestError, match=re.escape(f"{roots[0]} is the expert of cluster 0, not of 3")):
        check_experts(roots | {3: roots[0]}, clusterer_digest=CLUSTERER)


def test_experts_in_another_order_are_refused(root):
    # As sorted by name without leading zeros, which puts 11 before 3.
    roots = experts(root)
    swapped = {0: roots[0], 3: roots[11], 11: roots[3]}
    with pytest.raises(ManifestError, match=re.escape(f"{roots[11]} is the expert of cluster 11, not of 3")):
        check_experts(swapped, clusterer_digest=CLUSTERER)


@pytest.mark.parametrize("cluster", [None, "3", 3.5])
def test_model_of_no_cluster_is_refused(root, cluster):
    roots = experts(root, cluster=cluster)
    with pytest.raises(ManifestError, match=f"is the expert of cluster {cluster}, not of 3"):
        check_experts(roots, clusterer_digest=CLUSTERER)


def test_expert_of_another_clusterer_is_refused(root):
    roots = experts(root, clusterer_digest="0123456789abcdef" * 4)
    message = (
        f"{roots[3]} was trained under clusterer 0123456789ab, the router has cccccccccccc: weights would go to the "
        "wrong experts; train it again"
    )
    with pytest.raises(ManifestError, match=re.escape(message)):
        check_experts(roots, clusterer_digest=CLUSTERER)


def test_experts_of_the_clusterers_that_are_extended_pass_for_their_own_clusters(root):
    # Clusters 0 to 3 were there, 4 to 10 were added to those, 11 is the router's own.
    ancestors = (Ancestor(4, "a" * 64), Ancestor(11, "b" * 64))
    roots = experts(root, clusterer_digest="a" * 64) | {
        7: write(root, "cluster-00007", cluster=7, clusterer_digest="b" * 64)
    }
    check_experts(roots, clusterer_digest=CLUSTERER, ancestors=ancestors)


def test_expert_of_an_extended_clusterer_is_refused_for_a_cluster_that_it_did_not_have(root):
    roots = experts(root, clusterer_digest="a" * 64)
    with pytest.raises(ManifestError, match=re.escape(f"{roots[3]} was trained under clusterer aaaaaaaaaaaa")):
        check_experts(roots, clusterer_digest=CLUSTERER, ancestors=(Ancestor(3, "a" * 64),))


def test_model_that_knows_no_clusterer_is_refused(root):
    roots = experts(root, clusterer_digest=None)
    with pytest.raises(ManifestError, match="was trained under clusterer unknown, the router has cccccccccccc"):
        check_experts(roots, clusterer_digest=CLUSTERER)


def test_experts_of_two_tokenizers_are_refused(root):
    roots = experts(root, tokenizer_digest="u" * 64)
    message = f"{roots[0]} and {roots[3]} have different tokenizers: probabilities of their tokens cannot be mixed"
    with pytest.raises(ManifestError, match=re.escape(message)):
        check_experts(roots, clusterer_digest=CLUSTERER)
    # By itself such an expert is as good as any.
    check_experts({3: roots[3]}, clusterer_digest=CLUSTERER)


@pytest.mark.parametrize("damaged", [b"", b'{"format": 1, "clus', b"\xff\xfe{}"], ids=["empty", "cut", "not UTF-8"])
def test_damaged_file_is_refused(root, damaged):
    roots = experts(root)
    uri = storage.join(roots[3], "expert.json")
    storage.write_bytes(uri, damaged)
    with pytest.raises(ManifestError, match=re.escape(f"{uri} is damaged; train that expert again")):
        check_experts(roots, clusterer_digest=CLUSTERER)


@pytest.mark.parametrize(
    ("content", "given"), [({"format": 2}, "2"), ({"cluster": 3}, "None"), ([], "None"), (None, "None")], ids=str
)
def test_file_of_another_format_is_refused(root, content, given):
    roots = experts(root)
    uri = storage.join(roots[3], "expert.json")
    storage.write_bytes(uri, json.dumps(content).encode())
    message = f"{uri} has format {given}, this cbtm reads 1; train that expert again"
    with pytest.raises(ManifestError, match=re.escape(message)):
        check_experts(roots, clusterer_digest=CLUSTERER)
