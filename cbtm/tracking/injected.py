"""The run that the MLflow plugin of Kubeflow Pipelines has made for a pod.

With the plugin the API server opens an MLflow run for each pipeline run, the driver a nested one for each task, and
the task's pod gets its id as MLFLOW_RUN_ID, with MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_ID and credentials. The
launcher ends that run when the pod has ended, so it is taken over here, and its status is left alone.
"""

import os
from dataclasses import dataclass

from cbtm.process import in_kubernetes

RUN_VARIABLE, EXPERIMENT_VARIABLE, URI_VARIABLE = "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_TRACKING_URI"
INJECTED_TAG = "cbtm.injected"
"""On a run that the plugin opens and ends."""
SUPERSEDED_TAG = "cbtm.superseded_by"
"""On an earlier run of the same work, from before the plugin made another one for it."""

_taken_here: dict[str, str] = {}


@dataclass(frozen=True)
class Injection:
    """Ids of the run that is this pod's, and of its experiment; None where that is not given."""

    run_id: str
    experiment_id: str | None

    def take(self, run_key: str) -> bool:
        """Whether the run is for the work with this key: a pod has one, and the first that asks is the one."""
        return _taken_here.setdefault(self.run_id, run_key) == run_key


def injection(uri: str | None) -> Injection | None:
    """What the plugin has given this pod; None outside of Kubernetes, or where tracking goes to another server.

    Args:
        uri: The configured tracking URI.
    """
    run_id = os.environ.get(RUN_VARIABLE)
    if not run_id or not in_kubernetes():
        return None  # elsewhere somebody's own run, of something else
    if uri is not None and uri.rstrip("/") != os.environ.get(URI_VARIABLE, uri).rstrip("/"):
        return None
    return Injection(run_id, os.environ.get(EXPERIMENT_VARIABLE) or None)
