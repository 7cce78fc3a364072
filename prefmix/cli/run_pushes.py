"""`prefmix push RUN REPO`: the stages of a run as branches of a repository of models."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from prefmix.cli.progress import bars, run_beside
from prefmix.cli.screen import command_line, emit_json, out, say, say_next

if TYPE_CHECKING:
    from prefmix.publish import PushedRun


def push_stages(run: Path, repo: str, *, store: str | None, quiet: bool, as_json: bool, **options: Any) -> None:
    """Pushes a run and reports it; stages that are not merged are merged first. `options` are those of `push_run`."""
    started = time.monotonic()
    shown = not (quiet or as_json)
    if not options["adapters_only"] and not options["dry_run"]:
        _merge_first(run, store, shown)

    scratch = Path(mkdtemp(prefix="prefmix-push-"))

    def work() -> PushedRun:
        from prefmix.publish import push_run

        return push_run(run, repo, **options, scratch=scratch, progress=progress)

    try:
        with bars(shown) as progress:
            pushed = run_beside(work, abandon=lambda: "run it again to go on")
    finally:  # also at Ctrl-C, after which the thread does not come to it
        rmtree(scratch, ignore_errors=True)
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        branches = [{**asdict(branch), "bytes": branch.bytes} for branch in pushed.branches]
        emit_json({**asdict(pushed), "branches": branches, "seconds": seconds})
    elif quiet:
        say(pushed.repo)
    else:
        _report(pushed, seconds)
        if pushed.dry_run:
            asked = {"--tag": options["tag"], "--data": options["data"]}
            words = [word for name, value in asked.items() if value for word in (name, value)]
            flags = [f"--{name}" for name in ("private",) if options[name]]
            flags += ["--adapter"] if options["adapters_only"] else []
            say_next([(command_line("push", str(run), repo, *words, *flags), "send it")])


def _merge_first(run: Path, store: str | None, shown: bool) -> None:
    from prefmix.publish import unmerged

    for stage in unmerged(run):
        from prefmix.cli.merges import merge_run, report_merge

        started = time.monotonic()
        merged = merge_run(str(stage), store=store, force=True, shown=shown)
        if shown:
            report_merge(merged, time.monotonic() - started)
            say("")


def _report(pushed: PushedRun, seconds: float) -> None:
    from rich.text import Text

    from prefmix.cli.charts import Trimmed, grid, size
    from prefmix.cli.pages import titled

    new = [branch for branch in pushed.branches if branch.is_new_commit]
    if pushed.dry_run:
        done = "would be pushed: nothing was sent"
    else:
        done = f"pushed in {seconds:.1f} s" if new else "is there already"
    say((pushed.repo, "bold"), f"  {done}")
    if not pushed.dry_run:
        say((pushed.url, "dim"))
    table = grid("branch", "stage", "", ">files", ">size", "", header=True)
    for branch in pushed.branches:
        there = "" if branch.is_new_commit else "is there"
        removed = f"{len(branch.removed)} go" if branch.removed else ""
        table.add_row(
            Text(branch.name),
            Text(branch.stage),
            Text(branch.form),
            str(len(branch.files)),
            size(branch.bytes),
            Text(there or removed, "dim"),
        )
    note = f"tag {pushed.tag} {'is new' if pushed.is_new_tag else 'is there'} on main" if pushed.tag else ""
    out().print(titled("Branches", Trimmed(table), note))
