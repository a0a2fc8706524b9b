"""Merge: route each token by its context, mix the experts, and say how good the mixture is."""
