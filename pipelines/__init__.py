"""Pipelines composed of the components; compiled into `cbtm/compiled`, which is what runs."""
