"""Cluster-Branch-Train-Merge: find the domains of a corpus, train an expert on each, mix them by context.

The packages are the words of the method (Gururangan et al. 2023, arXiv 2303.14177): `cluster`, `branch`,
`train`, `merge`. Importing `cbtm` alone loads none of kfp, mlflow and torch.
"""

__version__ = "0.1.0"
