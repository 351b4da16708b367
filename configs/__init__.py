"""Experiments, one YAML each."""
