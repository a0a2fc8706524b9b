"""Logs of the pods of a TrainJob, followed side by side and read by one."""

import json
import logging
import queue
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cbtm.kubernetes import Kubernetes, KubernetesError, NodePod

logger = logging.getLogger(__name__)

METRICS = "metrics "  # how a line begins that has metrics in JSON, and their step
_AGAIN_SECONDS = 1.0  # before a log that broke off is asked for once more


@dataclass
class _Followed:
    """One pod's log.

    Attributes:
        thread: Reads it; None before it began.
        since: Time of the last line.
        is_whole: Whether it was read to the end after its container had ended.
    """

    thread: threading.Thread | None = None
    since: str | None = None
    is_whole: bool = False


class PodLogs:
    """Lines of all pods of one TrainJob, each once, in the order of their arrival."""

    def __init__(self, api: Kubernetes) -> None:
        self._api = api
        self._pods: dict[str, _Followed] = {}
        self._lines: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()

    def follow(self, pods: Iterable[NodePod]) -> None:
        """Follow the logs of these pods, as far as there are any; to be called again and again."""
        for pod in pods:
            followed = self._pods.setdefault(pod.uid, _Followed())
            if followed.thread is not None and followed.thread.is_alive():
                continue
            has_ended = pod.ended is not None and not pod.runs
            if pod.runs or (has_ended and not followed.is_whole):
                followed.thread = threading.Thread(target=self._read, args=(pod, followed, has_ended), daemon=True)
                followed.thread.start()

    def take(self) -> list[tuple[int, str]]:
        """Number of the machine and text of the lines that have come since the last call."""
        found = []
        while not self._lines.empty():
            found.append(self._lines.get())
        return found

    def wait(self, seconds: float, pods: Iterable[NodePod]) -> None:
        """Wait until the logs of these pods have been read to their ends."""
        until = time.monotonic() + seconds
        for pod in pods:
            followed = self._pods.get(pod.uid)
            if followed is not None and followed.thread is not None:
                followed.thread.join(max(0.0, until - time.monotonic()))

    def _read(self, pod: NodePod, followed: _Followed, has_ended: bool) -> None:
        while True:
            try:
                for at, text in self._api.log(pod.name, followed.since):
                    followed.since = at
                    self._lines.put((pod.node, text))
            except ConnectionError as error:
                logger.debug("log of pod %s broke off: %s", pod.name, error)
                time.sleep(_AGAIN_SECONDS)
                continue
            except KubernetesError as error:
                # A pod that is gone takes its log along; one that still starts has none yet.
                logger.debug("%s", error)
            followed.is_whole = has_ended
            return


def parse_metrics(line: str) -> tuple[Mapping[str, float], int] | None:
    """Metrics and step of a line that has them."""
    if not line.startswith(METRICS):
        return None
    try:
        values: dict[str, Any] = json.loads(line.removeprefix(METRICS))
        return {name: float(value) for name, value in values.items() if name != "step"}, int(values["step"])
    except (ValueError, KeyError, TypeError):
        return None


def metrics_line(metrics: Mapping[str, float], step: int) -> str:
    """The line that `parse_metrics` reads."""
    return METRICS + json.dumps({"step": step, **{name: float(value) for name, value in metrics.items()}})
