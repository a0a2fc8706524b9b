"""Run the compiled pipeline in its images: `python drive.py CONFIG SCRATCH LABEL [USER]`.

A process of its own, because kfp.local prints, takes over the root logger and keeps its settings in a global. The
variables whose names begin as in PASSED go to every container, as a secret and a config map do on a cluster.
"""

import os
import sys
from pathlib import Path

from kfp import components, local

from cbtm.kubeflow.pipeline_file import for_this_machine, shipped_pipeline

PASSED = ("AWS_", "CBTM_", "MLFLOW_", "GOMP_")


def main() -> None:
    """Run to the end, or raise what kfp raises."""
    config, scratch, label, *user = sys.argv[1:]
    # kfp makes the folders of outputs as the user of this process; the user of an image is to write there.
    os.umask(0)
    Path(scratch).mkdir()
    environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
    settings = {"user": user[0]} if user else {}  # or else the one that the image names
    runner = local.DockerRunner(network_mode="host", environment=environment, labels={"cbtm.test": label}, **settings)
    local.init(runner=runner, pipeline_root=scratch, raise_on_error=True)
    pipeline = components.load_component_from_text(for_this_machine(shipped_pipeline()))
    pipeline(config=Path(config).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
