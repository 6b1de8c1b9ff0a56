"""Teacher runs: the models the other runs start from."""
