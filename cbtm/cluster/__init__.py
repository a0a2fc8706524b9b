"""Cluster: find the domains of a corpus and say to which of them a text belongs."""
