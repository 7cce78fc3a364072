"""To and from the Hub: push, pull."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import click

from prefmix.cli.options import json_option, store_option
from prefmix.cli.progress import bars, run_beside
from prefmix.cli.screen import command_line, emit_json, out, say, say_next, say_warnings

if TYPE_CHECKING:
    from prefmix.mixture import Mixture
    from prefmix.publish import Pushed

_NOTHING_TAGGED = "no tag was made; run it again to go on"
_quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print the reference only.")


@click.command("push")
@click.argument("mixture", metavar="MIXTURE|RUN")
@click.argument("repo", metavar="REPO")
@click.option(
    "--tag", metavar="TAG", help="The tag on the Hub; else, of a mixture, the label of its version, as in v1."
)
@click.option("--private", is_flag=True, help="Make the repository private, if it has to be made.")
@click.option("--message", metavar="TEXT", help="The title of the commit.")
@click.option("--no-drops", is_flag=True, help="Leave the ledger out: the ids and evidence of rows that were dropped.")
@click.option(
    "--adapter", is_flag=True, help="Of a run: push the adapters, in place of merged weights with adapters beside."
)
@click.option(
    "--data", metavar="REPO@TAG", help="Of a run: where its mixture is on the Hub, for the card; it is checked."
)
@click.option("--dry-run", is_flag=True, help="Say what would be sent and how much of it is there; send nothing.")
@_quiet_option
@store_option
@json_option
def push_command(
    mixture: str,
    repo: str,
    tag: str | None,
    private: bool,
    message: str | None,
    no_drops: bool,
    adapter: bool,
    data: str | None,
    dry_run: bool,
    quiet: bool,
    store: str | None,
    as_json: bool,
) -> None:
    """Push a mixture to the Hub, as one tagged commit with a card; or a run, as branches of a repository of models.

    MIXTURE is named as in show, REPO is user/name. The rows go as Parquet, with the card, the recipe and the ledger. A push
    that failed is finished by running it again: what is there is not sent twice, and the tag comes last. A tag that is on
    other content is not moved. The token is the one of `hf auth login` or HF_TOKEN.

    RUN is a folder of `prefmix train`: its last stage goes to main, merged into the base, earlier ones to the branches
    <stage>-v0, the adapters to branches beside. Stages that are not merged are merged first (see `prefmix merge`).
    """
    from prefmix.stages import stages_of

    if stages_of(Path(mixture)):
        from prefmix.cli.run_pushes import push_stages

        if no_drops:
            raise click.UsageError("--no-drops is for mixtures: a run has no ledger.")
        asked: dict[str, Any] = {"tag": tag, "private": private, "message": message, "dry_run": dry_run}
        push_stages(
            Path(mixture), repo, store=store, quiet=quiet, as_json=as_json, adapters_only=adapter, data=data, **asked
        )
        return
    if adapter or data:
        raise click.UsageError(
            f"--adapter and --data are for runs, and {mixture} is none: it has no stage with a run.json."
        )
    started = time.monotonic()
    scratch = Path(mkdtemp(prefix="prefmix-push-"))

    def work() -> tuple[Mixture, Pushed]:
        from prefmix.publish import open_mixture, push

        opened = open_mixture(mixture, store)
        keys: dict[str, Any] = {"tag": tag, "private": private, "message": message, "drops": not no_drops}
        return opened, push(opened, repo, **keys, dry_run=dry_run, scratch=scratch, progress=progress)

    try:
        with bars(not (quiet or as_json)) as progress:
            opened, pushed = run_beside(work, abandon=lambda: _NOTHING_TAGGED)
    finally:  # also at Ctrl-C, after which the thread does not come to it
        rmtree(scratch, ignore_errors=True)
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        totals = {"bytes": pushed.bytes, "bytes_there": pushed.bytes_there}
        about = {"mixture": str(opened), "digest": opened.digest, "build": opened.build}
        emit_json({**about, **asdict(pushed), **totals, "seconds": seconds})
    elif quiet:
        say(f"hub:{pushed.repo}@{pushed.tag}")
    else:
        _report(opened, pushed, seconds)
        if dry_run:
            words = [mixture, repo, *(["--tag", tag] if tag else []), *(["--private"] if private else [])]
            say_next([(command_line("push", *words, *(["--no-drops"] if no_drops else []), store=store), "send it")])
        else:
            say_next([(command_line("pull", f"{pushed.repo}@{pushed.tag}"), "get it on another machine")])


@click.command("pull")
@click.argument("reference", metavar="REPO@TAG")
@click.option("--name", metavar="NAME", help="What it is called in the store; else as where it was pushed from.")
@_quiet_option
@store_option
@json_option
def pull_command(reference: str, name: str | None, quiet: bool, store: str | None, as_json: bool) -> None:
    """Pull a mixture from the Hub into the store.

    REPO@TAG is user/name@v2, with or without hub: before it. Every file is checked against the mixture.json of the
    repository, and the rows against their digest. It keeps the label of its version where the store has that free. Without
    the Hub, a tag that was pulled before is served as it was then, and no other.
    """
    started = time.monotonic()
    mixture = pulled(reference, store, name, shown=not (quiet or as_json), said=not as_json)
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        keys = ("name", "version", "build", "digest", "subsets", "hub")
        found = {key: mixture.manifest.get(key) for key in keys}
        emit_json({**found, "folder": mixture.place, "up_to_date": not mixture.is_new, "seconds": seconds})
    elif quiet:
        say(str(mixture))
    elif not mixture.is_new:
        say((str(mixture), "bold"), " is up to date  ", (mixture.place, "dim"))
    else:
        from prefmix.cli import pages

        say((str(mixture), "bold"), f"  digest {mixture.digest[:12]}  pulled in {seconds:.1f} s")
        say((mixture.place, "dim"))
        out().print(pages.titled("Splits", pages.splits_page(mixture.manifest)))
        say_next([(command_line("show", str(mixture), store=store), "what is in it")])


def pulled(
    reference: str, store: str | None, name: str | None = None, *, shown: bool = True, said: bool = True
) -> Mixture:
    """The mixture of a reference to the Hub, from the store or put into it; says so when its label is another there."""

    def work() -> Mixture:
        from prefmix.publish import pull

        return pull(reference, store, name=name, progress=progress)

    with bars(shown) as progress:
        mixture = run_beside(work)
    pushed_as = mixture.manifest.get("hub", {}).get("version", mixture.version)
    if said and mixture.is_new and pushed_as != mixture.version:
        say_warnings(
            [f"{mixture.name}@{pushed_as} is another mixture in this store: what was pulled is called {mixture}"]
        )
    return mixture


def _report(mixture: Mixture, pushed: Pushed, seconds: float) -> None:
    from prefmix.cli.charts import size

    reference = (f"hub:{pushed.repo}@{pushed.tag}", "bold")
    if pushed.dry_run and not pushed.files:
        what = "the tag would be made" if pushed.is_new_tag else "is there already"
        say(reference, f"  {what}: digest {mixture.digest[:12]}; nothing was sent")
    elif not pushed.files:
        what = "was there, the tag is new" if pushed.is_new_tag else "is there already"
        say(reference, f"  {what}: digest {mixture.digest[:12]}")
    else:
        done = "would be pushed: nothing was sent" if pushed.dry_run else f"pushed in {seconds:.1f} s"
        say(reference, f"  digest {mixture.digest[:12]}  {done}")
    if not pushed.dry_run:
        say((pushed.url, "dim"))
    if not pushed.files:
        return
    from rich.text import Text

    from prefmix.cli.charts import Trimmed, grid
    from prefmix.cli.pages import titled

    table = grid("", ">", "~")
    for file in pushed.files:
        table.add_row(Text(file.path), size(file.bytes), Text("is there" if file.is_there else "", "dim"))
    for path in pushed.removed:
        table.add_row(Text(path), "", Text("goes", "yellow"))
    there = f"{size(pushed.bytes_there)} of it" if pushed.bytes_there else "none of it"
    note = f"{len(pushed.files)} files, {size(pushed.bytes)}, {there} on the Hub before"
    out().print(titled("Files", Trimmed(table), note))
