"""The processes that train one model together, as torchrun has started them; most often there is only one."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_PATIENCE = timedelta(minutes=30)  # rank 0 may wait for an object store that is away, and the others for rank 0


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: Its number, from 0.
        world_size: How many there are.
        device: Where this process computes.
        n_nodes: Machines that they run on, as many on each, in the order of their numbers.
    """

    rank: int
    world_size: int
    device: torch.device
    n_nodes: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all: it reports, and publishes what all have written."""
        return self.rank == 0

    @property
    def node(self) -> int:
        """Number of this process's machine, from 0."""
        return self.rank // (self.world_size // self.n_nodes)

    @property
    def is_first_of_node(self) -> bool:
        """Whether this process speaks for its machine: it moves what lies on the disk there."""
        return self.rank % (self.world_size // self.n_nodes) == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over all ranks, in float64; every rank gets the sums."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def from_first(self, value: Any) -> Any:
        """What rank 0 gives, on every rank; plain data only."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def first_of(self, value: str | None) -> str | None:
        """What the lowest rank gives that gives anything, on every rank."""
        if self.world_size == 1:
            return value
        values: list[str | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return next((given for given in values if given is not None), None)

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.world_size > 1:
            self.sum([0.0])


def choose_device(name: str) -> torch.device:
    """Resolve `auto` to a GPU where there is one; of several, the one of this process under torchrun."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the other processes that torchrun has started, if it has started any."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks(0, 1, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), world_size, device, int(os.environ.get("GROUP_WORLD_SIZE", "1")))
    finally:
        # After an error the others may be gone: leaving is no collective, and the first error is the one to show.
        dist.destroy_process_group()
