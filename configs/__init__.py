"""Experiments, tasks and model sizes as YAML; installed as the package `hkt_hf.configs`, which `hkt` reads by name."""
