"""Experiments of several runs each, whose results lie in `results/`."""
