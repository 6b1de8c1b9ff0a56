"""Kinds of attachment that an edit may carry: one file per kind, file name = kind, each with one function `build`."""
