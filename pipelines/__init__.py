"""A model as its user holds it: open, generate, edit, export."""
