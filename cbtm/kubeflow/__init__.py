"""Kubeflow Pipelines from outside of it: the compiled pipeline, its parameters, and the runs of a cluster."""
