"""Attacks on erased models, one per file; found by their file names."""
