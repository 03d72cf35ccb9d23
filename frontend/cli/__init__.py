"""The command line ``gossamer``, a file a command."""
