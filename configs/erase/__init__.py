"""Erasure runs: concepts are removed from a model."""
