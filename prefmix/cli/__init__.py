"""The command line: main.py runs it, prefmix/__main__.py is its process. Nothing heavy is imported before a command runs."""
