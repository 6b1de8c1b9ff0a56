"""One adapter per model family; a family is found by the pipeline classes its file names."""
