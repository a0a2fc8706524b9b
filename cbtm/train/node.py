"""One machine among those that train a model together, as torchrun is told of it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from cbtm.errors import ConfigError

# What a PyTorch runtime of Kubeflow Trainer sets in each pod; torchrun would read them by itself.
_NUMBER, _COUNT, _PROCESSES = "PET_NODE_RANK", "PET_NNODES", "PET_NPROC_PER_NODE"
_ADDRESS, _PORT = "PET_MASTER_ADDR", "PET_MASTER_PORT"


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
