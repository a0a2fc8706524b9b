import pytest

from cbtm.errors import ConfigError
from cbtm.train.node import Node

POD = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "4",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29500",
}


def test_node_is_what_the_runtime_says():
    node = Node.of_environment(2, 4, POD)
    assert node == Node(1, 2, "job-node-0-0.job", 29500)
    assert list(node.ranks(4)) == [4, 5, 6, 7]
    assert Node.parse(node.arguments()) == node


@pytest.mark.parametrize("name", sorted(POD))
def test_runtime_that_is_none_of_pytorchs_is_said(name):
    with pytest.raises(ConfigError, match=f"{name} is not set: .* a TrainJob, whose runtime has mlPolicy.torch"):
        Node.of_environment(2, 4, {**POD, name: ""})


@pytest.mark.parametrize(("name", "value"), [("PET_NNODES", "3"), ("PET_NPROC_PER_NODE", "auto")])
def test_runtime_that_sets_other_numbers_is_said(name, value):
    wanted = POD[name]
    with pytest.raises(
        ConfigError, match=f"{name}={value}, but the training is planned for {wanted}; the runtime must"
    ):
        Node.of_environment(2, 4, {**POD, name: value})
