"""Kubeflow Pipelines components: one file each, doorways to `cbtm.stages` with no logic of their own."""
