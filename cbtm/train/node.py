"""One machine among those that train a model together: what it is, and what torchrun is told of it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from cbtm.config import Config
from cbtm.errors import ConfigError

# What a PyTorch runtime of Kubeflow Trainer sets in each pod; torchrun would read them by itself.
_NUMBER, _COUNT, _PROCESSES = "PET_NODE_RANK", "PET_NNODES", "PET_NPROC_PER_NODE"
_ADDRESS, _PORT = "PET_MASTER_ADDR", "PET_MASTER_PORT"

_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"  # of Kubernetes, without exponents


@dataclass(frozen=True)
class Node:
    """One machine of several.

    Attributes:
        number: Its own, from 0.
        count: How many there are.
        address: Where the first one is reached, by all.
        port: Its free port, at which they meet.
    """

    number: int
    count: int
    address: str
    port: int

    @classmethod
    def of_environment(cls, n_nodes: int, n_processes: int, environment: Mapping[str, str] = os.environ) -> "Node":
        """This machine, as the variables say that a PyTorch runtime sets.

        Args:
            n_nodes: How many machines the training is to have.
            n_processes: How many processes each of them.
            environment: The variables.

        Raises:
            ConfigError: If one is missing, or they say something else.
        """
        missing = [name for name in (_NUMBER, _COUNT, _PROCESSES, _ADDRESS, _PORT) if not environment.get(name)]
        if missing:
            raise ConfigError(
                f"{missing[0]} is not set: a node runs in a pod of a TrainJob, whose runtime has mlPolicy.torch"
            )
        for name, wanted in ((_COUNT, n_nodes), (_PROCESSES, n_processes)):
            if environment[name] != str(wanted):
                raise ConfigError(
                    f"{name}={environment[name]}, but the training is planned for {wanted}; the runtime must take the "
                    "numbers of nodes and processes from the TrainJob"
                )
        return cls(int(environment[_NUMBER]), n_nodes, environment[_ADDRESS], int(environment[_PORT]))

    def ranks(self, n_processes: int) -> range:
        """Numbers of the ranks on it."""
        return range(self.number * n_processes, (self.number + 1) * n_processes)

    def arguments(self) -> list[str]:
        """As text, for a command line."""
        return [str(self.number), str(self.count), self.address, str(self.port)]

    @classmethod
    def parse(cls, arguments: list[str]) -> "Node":
        """Inverse of `arguments`."""
        number, count, address, port = arguments
        return cls(int(number), int(count), address, int(port))


class NodeConfig(Config):
    """What each machine of a training on several is, and how Kubernetes is asked for it.

    What is None is as in the pod of the task itself, where that runs in one.

    Attributes:
        namespace: Kubernetes namespace of the TrainJob.
        runtime: Name of a ClusterTrainingRuntime with mlPolicy.torch.
        image: Container image with the same version of cbtm.
        gpu_type: Resource name of the GPUs, of which a machine gets `devices`; on the CPU it gets none.
        cpu: CPUs of a machine, as Kubernetes writes quantities.
        memory: Memory of a machine, `shm_size` included.
        shm_size: Size of /dev/shm, which is memory.
        tolerations: Tolerations of the pods, as Kubernetes writes them.
        node_selector: Labels of the nodes that the pods may run on.
        service_account: Service account of the pods.
        secret: Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed, AWS_SESSION_TOKEN,
            AWS_ENDPOINT_URL and AWS_DEFAULT_REGION.
        queue: Local queue of Kueue that admits the TrainJob.
        restarts: How often in succession all machines are started again after one was lost, if they come no further;
            they go on from the last checkpoint.
    """

    namespace: str | None = Field(default=None, min_length=1)
    runtime: str = Field(default="torch-distributed", min_length=1)
    image: str | None = Field(default=None, min_length=1)
    gpu_type: str = Field(default="nvidia.com/gpu", min_length=1)
    cpu: str | None = Field(default=None, pattern=_QUANTITY)
    memory: str | None = Field(default=None, pattern=_QUANTITY)
    shm_size: str = Field(default="8Gi", pattern=_QUANTITY)
    tolerations: tuple[dict[str, Any], ...] | None = None
    node_selector: dict[str, str] | None = None
    service_account: str | None = Field(default=None, min_length=1)
    secret: str | None = Field(default=None, min_length=1)
    queue: str | None = Field(default=None, min_length=1)
    restarts: int = Field(default=3, ge=0)
