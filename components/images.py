"""Names of the images that components run in; the one place that spells them.

CBTM_IMAGE_CPU and CBTM_IMAGE_GPU override them when pipelines are compiled. `python` in the name keeps
kfp.local's SubprocessRunner, which runs no image at all, from warning at every task.
"""

import os

import cbtm

VERSION = cbtm.__version__
CPU = os.environ.get("CBTM_IMAGE_CPU", f"ghcr.io/cbtm/cbtm-python-cpu:{VERSION}")
GPU = os.environ.get("CBTM_IMAGE_GPU", f"ghcr.io/cbtm/cbtm-python-cuda:{VERSION}")
