"""Train: one causal language model on one cluster, with no communication between experts."""
