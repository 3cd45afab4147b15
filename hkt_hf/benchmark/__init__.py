"""Measurements of speed and memory, each against its flat twin in the same run."""
