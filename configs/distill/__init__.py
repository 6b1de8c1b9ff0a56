"""Distillation runs: a teacher becomes a one-step student."""
