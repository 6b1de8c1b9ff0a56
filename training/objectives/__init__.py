"""One training objective per file; the file's name is the method's name."""
