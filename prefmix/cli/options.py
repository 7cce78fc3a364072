"""The options that several commands have."""

from __future__ import annotations

import click

override_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe, as in filter.min_margin=1.0; may be given more than once.",
)
store_option = click.option(
    "--store",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Folder or address (s3://...) that holds the mixtures; else PREFMIX_STORE, else ./mixtures.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
