"""The command line: reads arguments, calls the other packages, and prints. One module per group of commands."""

from poise.cli.main import cli, main

__all__ = ["cli", "main"]
