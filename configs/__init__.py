"""Packaged run configurations, one YAML file per run, found by name."""
