"""The Ink teacher and detector: data only."""
