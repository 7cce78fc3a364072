"""The group of commands, and what becomes of errors."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from typing import Any

import click

from prefmix.errors import PrefmixError, RecipeError

#: Where each command lives and what it does: the help page needs no import of the modules.
COMMANDS = {
    "init": ("prefmix.cli.starters", "Write a starter recipe for data files, or copy a shipped recipe."),
    "check": ("prefmix.cli.recipes", "Check a recipe and say what a build would read."),
    "schema": ("prefmix.cli.recipes", "Print the JSON Schema of recipes, for editors."),
    "sources": ("prefmix.cli.formats", "List the formats that can be read, or show the data card of one."),
    "build": ("prefmix.cli.builds", "Build a mixture from a recipe."),
    "show": ("prefmix.cli.mixtures", "Show what is in a mixture and what became of the rows that are not."),
    "diff": ("prefmix.cli.mixtures", "Say which rows came, went or moved between two mixtures, and why."),
    "drops": ("prefmix.cli.mixtures", "List the rows that are not in a mixture, with their reasons."),
    "why": ("prefmix.cli.mixtures", "Tell the story of one row: why it is in a mixture, or why not."),
    "contamination": ("prefmix.cli.contaminations", "Say which benchmarks a data set holds text of, and where."),
    "list": ("prefmix.cli.mixtures", "List the mixtures in the store and their versions."),
    "rm": ("prefmix.cli.mixtures", "Remove a version of a mixture."),
    "push": ("prefmix.cli.hubs", "Push a mixture to the Hub, as one tagged commit with a card."),
    "pull": ("prefmix.cli.hubs", "Pull a mixture from the Hub into the store."),
    "train": ("prefmix.cli.trains", "Train a model on a mixture, as the recipe says."),
    "merge": ("prefmix.cli.merges", "Merge an adapter into its base, checked against the model that was trained."),
    "eval": ("prefmix.cli.evals", "Evaluate a model on suites of benchmarks."),
    "export": ("prefmix.cli.exports", "Write a model as one GGUF file, for llama.cpp and others."),
    "chat": ("prefmix.cli.chats", "Talk to a model in the terminal, or to two on the same prompt."),
}

FIRST_STEPS = "First steps: prefmix init --recipe quickstart, then prefmix build quickstart.toml"


class Commands(click.Group):
    """Imports the module of a command when the command is run; suggests the nearest name for one that is unknown."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return getattr(import_module(COMMANDS[cmd_name][0]), f"{cmd_name}_command")

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        from difflib import get_close_matches

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=Commands, epilog=FIRST_STEPS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="prefmix", prog_name="prefmix")
def prefmix() -> None:
    """Curate and mix preference and SFT data sets into versioned, explainable mixtures."""


def run(arguments: list[str]) -> int:
    """Runs one command; gives its exit code. An error is a line on stderr; PREFMIX_DEBUG=1 adds the traceback."""
    try:
        code = prefmix.main(arguments, prog_name="prefmix", standalone_mode=False)
        sys.stdout.flush()  # here, where a reader that went away is known what to do about
        return code if isinstance(code, int) else 0  # click gives back the code of an Exit
    except RecipeError as error:
        return _failed(_listed(error), error.exit_code)
    except PrefmixError as error:
        return _failed(str(error), error.exit_code)
    except click.ClickException as error:
        error.show(file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        click.echo(f"interrupted: {error}" if str(error) else "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit:  # click's own answer to the same
        return 0
    except BaseException as error:  # Polars panics with an exception that is no Exception
        if os.environ.get("PREFMIX_DEBUG") == "1":
            raise
        return _failed(f"unexpected {type(error).__name__}: {error}\nThis is a defect of prefmix. Run again with "
                       f"PREFMIX_DEBUG=1 and report what it prints.", 1)  # fmt: skip


def _listed(error: RecipeError) -> str:
    """One problem as it is; several below a line that counts them, each beginning with `<file>:<line>:`."""
    if len(error.problems) == 1:
        return str(error)
    return f"{error.path} has {len(error.problems)} problems\n{error}"


def _failed(text: str, code: int) -> int:
    if os.environ.get("PREFMIX_DEBUG") == "1":
        traceback.print_exc()
    lines = [line for line in text.splitlines() if line]
    text = "\n".join([f"{click.style('error:', fg='red', bold=True)} {lines[0]}", *lines[1:]])
    click.echo(text, file=sys.stderr, color=False if os.environ.get("NO_COLOR") else None)
    return code
