"""Corpora that any machine can have: a sample of installed packages, own text, public downloads."""
