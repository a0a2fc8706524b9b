"""Checkpoints of a training run: everything that the next step depends on, safetensors and JSON, no pickle.

Each checkpoint is a folder with its own manifest, published whole; a torn one has no manifest and is passed over.
Below one URI lie the checkpoints of one training run, bound to it by the run's key: another configuration or other
data never resumes from them. Tensors are written by torch.distributed.checkpoint, each rank its own part, in its
safetensors format; read on another number of ranks, each takes the part that is its own then. Of ranks on several
machines each machine uploads what it has (`cbtm.train.parts`). Random generators are not in it: each step seeds them
anew.

A checkpoint is written to this machine's disk while the training waits, and published while it goes on.
"""

import contextlib
import json
import logging
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cbtm import manifest, storage
from cbtm.errors import CbtmError, ManifestError, StorageError
from cbtm.manifest import Manifest
from cbtm.train.parts import place_part, publish_parts
from cbtm.train.ranks import Ranks
from cbtm.train.uploads import Uploads

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STAGE = "checkpoint"
_STATE = "state.json"
_READ = (".safetensors", ".json")  # nothing that could hold code
_LAST_SECONDS = 60.0  # for publishing after an error: about the notice that a machine is given before it goes
_FILE_BYTES = 2 << 30  # what is written at a time is in memory once more


@dataclass(frozen=True)
class TrainState:
    """Progress beside the tensors.

    Attributes:
        step: Steps taken.
        curve: Points of the training curve so far.
        losses: Losses of the steps since its last point, which the next point is the mean of.
        tokens: Tokens trained on so far.
        seconds: Time of the steps so far.
        optimizer_steps: Steps that the optimiser has taken: fewer where float16 left some out.
        loss_scale: Loss scale of float16, and the steps since it last changed.
        best: Lowest validation loss on the own domain, its step, and the validations since.
    """

    step: int
    curve: list[dict[str, float]]
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    optimizer_steps: int = 0
    loss_scale: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)


class Checkpoints:
    """Checkpoints below one URI, the newest kept; every rank holds one and calls the same methods.

    Args:
        uri: Folder or s3:// prefix of this training run's checkpoints.
        key: Identity of the training run.
        scratch: Local folder for building and fetching, the same for all ranks of a machine.
        keep: How many complete checkpoints stay.
        ranks: The ranks; None for one process.
        describe: Writes what belongs beside the tensors (the model's configuration, its tokenizer) into a folder, so
            that a checkpoint alone can be made a model of.
    """

    def __init__(
        self,
        uri: str,
        *,
        key: str,
        scratch: Path,
        keep: int = 1,
        ranks: Ranks | None = None,
        describe: Callable[[Path], None] | None = None,
    ) -> None:
        self.uri, self._key, self._scratch, self._keep = uri, key, scratch, keep
        self._alone = ranks is None or ranks.world_size == 1
        self._ranks, self._describe = ranks, describe
        self._uploads, self._saved = Uploads(), 0
        self._best: Checkpoints | None = None

    @property
    def best(self) -> "Checkpoints":
        """Checkpoints of the best validation, beside the newest ones; one is kept."""
        if self._best is None:
            self._best = Checkpoints(
                storage.join(self.uri, "best"),
                key=self._key,
                scratch=self._scratch / "best",
                ranks=self._ranks,
                describe=self._describe,
            )
        return self._best

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._uploads.close(seconds=_LAST_SECONDS)
        if self._best is not None:
            self._best.__exit__(*error)

    def save(self, state: TrainState, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint to this machine and have it published, and the older ones dropped, beside the training.

        Raises:
            StorageError: If this machine's disk is full.
        """
        token = None
        if self._n_nodes > 1:
            # One at a time: machines that publish at their own pace would leave out different ones.
            self.settle()
            token = self._from_first(uuid.uuid4().hex)
        self._saved += 1  # no two in one folder: one of the same step may still be on its way
        work = self._scratch / f"saving-{state.step:08d}-{self._saved}"
        if self._is_first_of_node:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        with _disk_full_as_storage_error(work):
            self._wait()
            writer = HuggingFaceStorageWriter(str(work), fqn_to_index_mapping=_files_of(tensors), save_distributed=True)
            with _quiet():
                state_dict_saver.save(dict(tensors), storage_writer=writer, no_dist=self._alone)
            if self._is_first:
                (work / _STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
                if self._describe is not None:
                    self._describe(work)
        if self._is_first_of_node:
            self._uploads.submit(work, lambda folder: self._publish(state.step, folder, token))

    def settle(self) -> str | None:
        """Wait until what was saved is published; returns why the newest checkpoint could not be, if so."""
        problem = None
        if self._is_first_of_node:
            try:
                self._uploads.drain()
            except (CbtmError, OSError) as error:
                problem = str(error)
        return problem if self._ranks is None else self._ranks.first_of(problem)

    def restore(self, tensors: MutableMapping[str, Tensor]) -> TrainState | None:
        """Fill `tensors` from the newest complete checkpoint of this training run, or return None without one.

        Raises:
            ManifestError: If it is complete but of another model than `tensors` are.
        """
        if self._is_first_of_node:
            for left in self._scratch.glob("saving-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        step = self._from_first(self._fetch_newest() if self._is_first else None)
        if self._is_first and self._n_nodes > 1:
            self._remove_beyond(step)
        if step is None:
            return None
        if self._is_first_of_node and not self._is_first:
            self._fetch(step)  # to this machine as well
        self._wait()
        state = load_checkpoint(self._fetched(step), tensors, alone=self._alone)
        self._wait()
        if self._is_first_of_node:
            shutil.rmtree(self._scratch / "restoring", ignore_errors=True)
        return state

    def clear(self) -> None:
        """Remove all checkpoints: the finished model has been published."""
        for each in (self.best, self):
            for step in each.steps():
                each._remove(step)
            if not storage.is_s3(each.uri):
                with contextlib.suppress(OSError):  # not there, or not empty
                    storage.local_path(each.uri).rmdir()

    def steps(self) -> list[int]:
        """Steps of which something is there, whole or torn, in ascending order."""
        names = {file.path.split("/")[0] for file in storage.list_files(self.uri)}
        return sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))

    def _fetch_newest(self) -> int | None:
        for step in reversed(self.steps()):
            spec = self._spec(step)
            try:
                if manifest.is_current(spec, manifest.load_if_there(spec.manifest_uri)):
                    self._fetch(step)
                    return step
            except ManifestError as error:
                logger.warning("checkpoint=%s passed over: %s", spec.root, error)
        return None

    def _fetch(self, step: int) -> None:
        """Bring a checkpoint to this machine, to where `_fetched` says."""
        spec = self._spec(step)
        shutil.rmtree(self._scratch / "restoring", ignore_errors=True)  # for the same reason as in _publish
        fetch_checkpoint(spec.root, manifest.load(spec.manifest_uri), self._scratch / "restoring")

    def _fetched(self, step: int) -> Path:
        root = self._spec(step).root
        return self._scratch / "restoring" if storage.is_s3(root) else storage.local_path(root)

    def _publish(self, step: int, folder: Path, token: str | None) -> None:
        if self._best is not None:
            self._best._uploads.drain()  # the state names the best checkpoint: without it, this one is of no use
        if token is None:
            # Of a killed try with more ranks there are more files, which a reader would take for a part of this one.
            self._remove(step)
            manifest.publish(self._spec(step), folder, {"step": step})
        elif not self._is_first:
            assert self._ranks is not None
            place_part(self._spec(step), folder, node=self._ranks.node, token=token)
            return
        else:
            publish_parts(self._spec(step), folder, {"step": step}, n_nodes=self._n_nodes, token=token)
        # Later steps than this one are torn or of another training run: this one has just come from before them.
        steps = self.steps()
        usable = [other for other in steps if other <= step and self._is_complete(other)]
        for old in sorted(set(steps) - set(usable[-self._keep :])):
            self._remove(old)

    def _spec(self, step: int) -> manifest.StageSpec:
        return manifest.StageSpec(_STAGE, storage.join(self.uri, f"step-{step:08d}"), self._key)

    def _is_complete(self, step: int) -> bool:
        spec = self._spec(step)
        try:
            return manifest.is_current(spec, manifest.load_if_there(spec.manifest_uri))
        except ManifestError:
            return False

    def _remove_beyond(self, step: int | None) -> None:
        """Remove what other machines could be uploading parts to later on: then there is nothing that could be torn."""
        for other in self.steps():
            if step is None or other > step:
                self._remove(other)

    def _remove(self, step: int) -> None:
        root = self._spec(step).root
        # The manifest goes first: a checkpoint that is half removed must not look whole.
        storage.delete(root, ["manifest.json"])
        storage.delete(root, [file.path for file in storage.list_files(root)])
        if not storage.is_s3(root):
            shutil.rmtree(storage.local_path(root), ignore_errors=True)

    @property
    def _n_nodes(self) -> int:
        return 1 if self._ranks is None else self._ranks.n_nodes

    @property
    def _is_first(self) -> bool:
        return self._ranks is None or self._ranks.is_first

    @property
    def _is_first_of_node(self) -> bool:
        return self._ranks is None or self._ranks.is_first_of_node

    def _from_first(self, value: T) -> T:
        found: T = value if self._ranks is None else self._ranks.from_first(value)
        return found

    def _wait(self) -> None:
        if self._ranks is not None:
            self._ranks.wait()


def fetch_checkpoint(root: str, found: Manifest, target: Path) -> Path:
    """Bring a complete checkpoint to this machine, checked.

    Raises:
        ManifestError: If a file differs from what the manifest says, or is of a kind that a checkpoint does not have,
            such as a pickle.
    """
    strange = [path for path in found.paths() if not path.endswith(_READ)]
    if strange:
        raise ManifestError(
            f"{root} holds {strange[0]}; a checkpoint is safetensors and JSON, and nothing else is read, because a "
            "pickle could run code: remove the file and the checkpoint"
        )
    return manifest.fetch(root, found, found.paths(), target)


def load_checkpoint(
    folder: Path, tensors: MutableMapping[str, Tensor], *, alone: bool = True, of_all: bool = True
) -> TrainState:
    """Fill `tensors`, each with its part, from the checkpoint in a local folder.

    Args:
        folder: The checkpoint.
        tensors: By name.
        alone: Whether this process reads by itself; otherwise all ranks read together.
        of_all: Whether the checkpoint must have no other tensors.

    Raises:
        ManifestError: If the checkpoint is of another model; nothing has been filled then.
    """
    there = checkpoint_shapes(folder)
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not of_all:
        there = {name: shape for name, shape in there.items() if name in wanted}
    if there != wanted:
        missing, unknown = wanted.keys() - there.keys(), there.keys() - wanted.keys()
        other = {name for name in wanted.keys() & there.keys() if wanted[name] != there[name]}
        raise ManifestError(
            f"the checkpoint {folder} is of another model: {len(missing)} of its tensors are missing, {len(unknown)} "
            f"are unknown and {len(other)} have another shape, such as {min(missing | unknown | other)}; remove the "
            "checkpoint to start afresh"
        )
    with _quiet():
        state_dict_loader.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    return read_state(folder)


def read_state(folder: Path) -> TrainState:
    """Progress of the checkpoint in a local folder."""
    values: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    return TrainState(**values)


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every tensor of the checkpoint in a local folder."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def _files_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of the file, from 1, that each tensor goes to: by whole sizes, and so the same on every rank."""
    files, number, size = {}, 1, 0
    for name in sorted(tensors):
        n_bytes = tensors[name].numel() * tensors[name].element_size()
        if size and size + n_bytes > _FILE_BYTES:
            number, size = number + 1, 0
        files[name] = number
        size += n_bytes
    return files


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remark that a process which trains alone has no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _disk_full_as_storage_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        # The failure of each rank, wrapped; what one sees first is the end of the text.
        if "No space left on device" in str(error):
            raise _disk_full(folder) from error
        raise
    except OSError as error:
        if "No space left on device" in str(error):
            raise _disk_full(folder) from error
        raise


def _disk_full(folder: Path) -> StorageError:
    return StorageError(
        f"no space left on the disk that holds {folder} for a checkpoint; free some (with an S3 root point "
        "CBTM_SCRATCH elsewhere) and run again: the training goes on from its last checkpoint"
    )
