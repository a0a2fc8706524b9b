"""Turns at the devices of one machine, for tasks that know nothing of each other.

`cbtm run` starts its tasks as separate processes, several at once. Each takes as many GPUs as it needs, or as many
cores as it has threads, and waits while others have them. A device is a file, having it is a lock on that file: the
kernel lets go of it however a process ends, so nothing is ever left taken. Tasks take all they need or nothing, and
only one of those that wait for the same devices may try at a time, so they neither wait for each other nor starve.

Nothing happens without CBTM_SLOTS, the folder of these files: a pod, or a command by itself, has its machine alone.
"""

import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cbtm.config import digest_of
from cbtm.errors import ConfigError, Interrupted, StorageError
from cbtm.process import stop_requested

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_TASK_BYTES = 2 << 30  # a task with PyTorch, transformers and a small model
_LEAST_TASKS = 2

_held: list[int] = []  # file descriptors of the locks that this process has


def default_folder() -> Path:
    """Folder of the lock files of this user on this machine."""
    return Path(tempfile.gettempdir()) / f"cbtm-slots-{os.getuid()}"


def held_locks() -> list[int]:
    """File descriptors of the locks that this process has: a child that inherits them keeps its devices as well."""
    return list(_held)


def cores() -> list[int]:
    """Numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def visible_gpus() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; CUDA is not initialised."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(number) for number in range(_count_gpus())]
    names = [name.strip() for name in chosen.split(",")]
    # CUDA reads up to the first one that is none.
    valid = next((at for at, name in enumerate(names) if not name or name.startswith("-")), len(names))
    return names[:valid] if _count_gpus() else []


def _count_gpus() -> int:
    """GPUs of this machine or container; asked of the driver's tool, because asking CUDA would settle the choice."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)  # noqa: S603 - no shell
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def tasks_at_once(n_devices: int, *, threads: int | None, device: str = "auto") -> int:
    """Trainings that this machine can take side by side.

    One for each `n_devices` GPUs; on the CPU one for each `n_devices * threads` cores, as far as memory allows for 2
    GiB each. Two at the least, so that one works while another reads or writes.
    """
    gpus = visible_gpus() if device != "cpu" else []
    if gpus:
        return max(_LEAST_TASKS, len(gpus) // n_devices)
    if threads is None:
        return _LEAST_TASKS
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(_LEAST_TASKS, min(len(cores()) // (n_devices * threads), memory // _TASK_BYTES))


@contextmanager
def device_slot(n_devices: int = 1, *, threads: int | None, device: str = "auto") -> Iterator[None]:
    """Have `n_devices` GPUs of this machine, or on the CPU `n_devices * threads` cores, for the length of the block.

    GPUs become CUDA_VISIBLE_DEVICES of this process, which must not have used CUDA, and of those that it starts. To
    cores it is bound, unless CBTM_PIN_CORES is 0. Cores are shared as the system likes where `threads` is None, and
    where fewer are there than asked for, which then takes all of them.

    Args:
        n_devices: Devices that train one model together.
        threads: CPU threads on each.
        device: auto, cpu or cuda, as in the configuration.

    Raises:
        ConfigError: If the machine has fewer GPUs.
        Interrupted: On SIGTERM or SIGINT while waiting.
        StorageError: If the lock files cannot be made.
    """
    folder = os.environ.get("CBTM_SLOTS")
    gpus = visible_gpus() if folder and device != "cpu" else []
    if not folder or (not gpus and threads is None):
        yield
        return
    if _held:
        raise RuntimeError("a process has one slot at a time: it would wait for itself")
    with ExitStack() as stack:
        if gpus:
            _check_gpus(n_devices, gpus)
            names = stack.enter_context(_taken(Path(folder), "gpu", gpus, n_devices))
            stack.enter_context(_visible(names))
        elif threads is not None:
            all_cores = [str(core) for core in cores()]
            wanted = n_devices * threads
            names = stack.enter_context(_taken(Path(folder), "core", all_cores, min(wanted, len(all_cores))))
            if wanted <= len(all_cores) and os.environ.get("CBTM_PIN_CORES") != "0":
                stack.enter_context(_bound_to({int(name) for name in names}))
        yield


def _check_gpus(n_devices: int, gpus: Sequence[str]) -> None:
    if n_devices > len(gpus):
        raise ConfigError(
            f"devices={n_devices}, but of this machine's GPUs {len(gpus)} may be used ({','.join(gpus)}); lower devices"
        )
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RuntimeError("a slot is taken before CUDA is used, or the choice of GPU has no effect")


@contextmanager
def _taken(folder: Path, kind: str, names: Sequence[str], n_wanted: int) -> Iterator[list[str]]:
    """Wait for `n_wanted` of the devices, and have them for the length of the block."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        locks = _wait_for(folder, kind, names, n_wanted)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot lock files below CBTM_SLOTS={folder}: {error.strerror}") from error
    _held.extend(locks.values())
    try:
        logger.info("slot %s=%s", kind, ",".join(locks))
        yield list(locks)
    finally:
        for lock in locks.values():
            _held.remove(lock)
            _unlock(lock)


def _wait_for(folder: Path, kind: str, names: Sequence[str], n_wanted: int) -> dict[str, int]:
    """Lock `n_wanted` devices, all or none at a time; returns a file descriptor for each."""
    # Only one of those that choose among the same devices tries: who waits for many is not overtaken by the others.
    gate = folder / f"{kind}-gate-{digest_of(list(names))[:16]}.lock"
    turn: int | None = None
    said = False
    with stop_requested() as stop, ExitStack() as stack:
        while True:
            if turn is None and (turn := _try_lock(gate)) is not None:
                stack.callback(_unlock, turn)
            locks = {} if turn is None else _lock_free(folder, kind, names, n_wanted)
            if len(locks) == n_wanted:
                return locks
            if not said:
                logger.info("slot waiting for %d of the %ss %s", n_wanted, kind, ",".join(names))
                said = True
            if stop.wait(_POLL_SECONDS):
                raise Interrupted(f"stopped while waiting for a free {kind}; nothing was begun")


def _lock_free(folder: Path, kind: str, names: Sequence[str], n_wanted: int) -> dict[str, int]:
    """Lock the first free devices; none of them where there are too few."""
    locks: dict[str, int] = {}
    for name in names:
        lock = _try_lock(folder / f"{kind}-{name.replace('/', '-')}.lock")
        if lock is not None:
            locks[name] = lock
        if len(locks) == n_wanted:
            return locks
    for lock in locks.values():
        _unlock(lock)
    return {}


def _try_lock(path: Path) -> int | None:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def _unlock(lock: int) -> None:
    fcntl.flock(lock, fcntl.LOCK_UN)  # closing alone would not do where a forked child has the file open
    os.close(lock)


@contextmanager
def _visible(gpus: Sequence[str]) -> Iterator[None]:
    """Let CUDA see these GPUs alone."""
    previous = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    try:
        yield
    finally:
        if previous is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = previous


@contextmanager
def _bound_to(chosen: set[int]) -> Iterator[None]:
    """Bind all threads of this process, and the processes that it starts, to some cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield  # no other system that PyTorch runs on can
        return
    previous = os.sched_getaffinity(0)
    _bind_threads(chosen)
    try:
        yield
    finally:
        _bind_threads(previous)


def _bind_threads(chosen: set[int]) -> None:
    for task in Path("/proc/self/task").iterdir():  # a call for the process would bind the calling thread alone
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), chosen)
