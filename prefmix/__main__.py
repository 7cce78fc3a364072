"""`python -m prefmix`."""

from prefmix.cli import main

main()
