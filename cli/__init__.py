"""The `sublimate` command: thin, one file per subcommand."""
