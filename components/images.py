"""Names of the images that components run in; the one place that spells them.

CBTM_IMAGE_CPU and CBTM_IMAGE_GPU override them when pipelines are compiled: another registry, or a digest instead of a
tag. `python` in the name keeps kfp.local's SubprocessRunner, which runs no image at all, from warning at every task.

    python -m components.images     names and version, as assignments: for builds, which run in a shell
"""

import os
import sys

import cbtm

VERSION = cbtm.__version__
CPU = os.environ.get("CBTM_IMAGE_CPU", f"ghcr.io/cbtm/cbtm-python-cpu:{VERSION}")
GPU = os.environ.get("CBTM_IMAGE_GPU", f"ghcr.io/cbtm/cbtm-python-cuda:{VERSION}")

if __name__ == "__main__":
    sys.stdout.write(f"CBTM_IMAGE_CPU={CPU}\nCBTM_IMAGE_GPU={GPU}\nVERSION={VERSION}\n")
