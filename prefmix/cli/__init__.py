"""The command line: `main` is its entry point. Nothing heavy is imported before a command runs."""

from prefmix.cli.main import main

__all__ = ["main"]
