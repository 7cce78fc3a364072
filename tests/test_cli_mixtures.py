"""The commands about mixtures, as they are typed: what they print, their JSON, their errors and exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

from prefmix.build import build
from prefmix.cli.main import run
from prefmix.store import Store, open_mixture


@pytest.fixture
def cli(versions, capsys, monkeypatch):
    """Runs a command on the store with the three versions; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv("PREFMIX_STORE", str(versions))

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def own(versions, tmp_path, monkeypatch) -> Path:
    """A store with quickstart@v1 that a test may harm, with its sources in `recipes` beside it."""
    shutil.copytree(versions.parent / "recipes", tmp_path / "recipes")
    build(tmp_path / "recipes" / "quickstart.toml", store=tmp_path / "store")
    return tmp_path / "store"


def process(*arguments: str, store: Path, **settings) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PREFMIX_STORE": str(store)}
    command = [sys.executable, "-m", "prefmix", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **settings)


# show


def test_show_has_the_funnel_the_sources_the_splits_the_lengths_and_what_was_reported(cli):
    code, page, complaints = cli("show", "quickstart@v1")
    assert (code, complaints) == (0, "")
    assert page.startswith("quickstart@v1  209 preference rows, 93 sft rows\n")
    headings = ["From rows read to rows", "Sources", "Splits", "Lengths", "Reported, not dropped", "Next:"]
    places = [page.index(f"\n{heading}") for heading in headings]
    assert places == sorted(places)
    assert re.search(r"^read +344 +█+$", page, re.MULTILINE)
    assert re.search(r"^  filter/tie +−3 +0\.9%  ━+╸?$", page, re.MULTILINE)
    assert re.search(r"^in the mixture +302 +87\.8%  █+", page, re.MULTILINE)
    assert re.search(r"^orca +124 +112 +90\.3% +37\.1%", page, re.MULTILINE)
    assert re.search(r"^chosen .*median 129\n.*p95 \d+ · longest 368$", page, re.MULTILINE)
    assert re.search(r"^ultrafeedback +97 +chosen +4 +4\.5 +5$", page, re.MULTILINE)


def test_pages_have_no_colour_codes_and_no_spaces_at_the_ends_of_lines_when_piped(versions):
    for arguments in (
        ("show", "quickstart@v1"),
        ("drops", "quickstart@v1"),
        ("diff", "quickstart@v1", "quickstart@v2"),
    ):
        done = process(*arguments, store=versions)
        assert (done.returncode, done.stderr) == (0, "")
        assert "\x1b" not in done.stdout
        assert [line for line in done.stdout.splitlines() if line != line.rstrip()] == []


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_pages_fit_the_width(cli, monkeypatch, columns):
    from prefmix.cli import screen

    monkeypatch.setenv("COLUMNS", columns)
    screen.out.cache_clear()
    screen.out().width = int(columns)
    try:
        for arguments in (("show", "quickstart@v1"), ("drops", "quickstart@v1", "--reason", "filter"), ("list",)):
            _, page, _ = cli(*arguments)
            assert re.search(r"\b(344|302)\b", page)
            body = page.split("\nNext:")[0]
            assert max(cell_len(line) for line in body.splitlines()) <= int(columns)
    finally:
        screen.out.cache_clear()


def test_show_as_json_has_the_numbers_of_the_manifest(cli, versions):
    code, text, _ = cli("show", "quickstart@v1", "--json")
    found, manifest = json.loads(text), open_mixture("quickstart@v1", versions).manifest
    assert code == 0
    for key in ("name", "version", "digest", "build", "funnel", "sources", "subsets", "audit"):
        assert found[key] == manifest[key]
    assert sum(found["rows_by_source"].values()) == 302
    assert {each["part"] for each in found["lengths"]} == {"prompt", "chosen", "rejected", "messages"}


def test_show_reads_a_sample_that_is_the_same_every_time(cli):
    _, page, _ = cli("show", "quickstart@v1", "--sample", "3")
    assert cli("show", "quickstart@v1", "--sample", "3")[1] == page
    rows = json.loads(cli("show", "quickstart@v1", "--sample", "3", "--json")[1])["rows"]
    assert len(rows) == 3
    for row in rows:
        assert row["id"][:12] in page
        assert row["parts"].keys() in ({"prompt", "chosen", "rejected"}, {"messages"})


def test_show_reads_dropped_rows_from_their_source_with_evidence(cli):
    _, page, _ = cli("show", "quickstart@v1", "--sample", "9", "--reason", "filter/tie")
    assert page.count("filter/tie  chosen and rejected have the same score") == 3
    assert "ultrafeedback · quickstart/ultrafeedback.jsonl:14" in page
    assert "chosen 4, rejected 4" in page
    assert "How do I keep fresh bread from going stale?" in page


def test_a_stage_means_all_its_reasons(cli):
    rows = json.loads(cli("show", "quickstart@v1", "--sample", "99", "--reason", "filter", "--json")[1])["rows"]
    assert len(rows) == 23
    assert {row["reason"].partition("/")[0] for row in rows} == {"filter"}


def test_a_row_with_the_same_prompt_is_shown_beside_the_one_that_was_kept(versions, own, cli):
    from prefmix.recipe import load_recipe

    build(load_recipe(own.parent / "recipes" / "quickstart.toml", ["dedupe.exact=prompt"]), store=own)
    page = cli("show", "quickstart", "--sample", "1", "--reason", "dedupe/prompt", "--store", str(own))[1]
    head = next(line for line in page.splitlines() if line.startswith("dropped"))
    assert re.fullmatch(r"dropped {10,}kept", head)
    user = next(line for line in page.splitlines() if line.startswith("user"))
    assert re.search(r"  the same$", page.split(user)[1].splitlines()[1])


def test_a_reason_needs_a_sample(cli):
    code, _, complaints = cli("show", "quickstart", "--reason", "filter/tie")
    assert (code, complaints) == (
        2,
        "error: --reason filter/tie needs --sample N; `prefmix drops` lists the rows of a reason.\n",
    )


def test_a_source_that_is_gone_is_a_warning_and_the_ledger_is_shown(cli, own):
    (own.parent / "recipes" / "quickstart" / "ultrafeedback.jsonl").unlink()
    code, page, complaints = cli("show", "quickstart", "--sample", "1", "--reason", "filter/tie", "--store", str(own))
    assert code == 0
    assert complaints.startswith(
        "warning: source ultrafeedback cannot be read again: quickstart/ultrafeedback.jsonl: no such file"
    )
    assert "chosen and rejected have the same score" in page


def test_texts_cannot_command_the_terminal(cli, own):
    path = own.parent / "recipes" / "quickstart" / "orca.jsonl"
    row = {
        "system": "",
        "question": "a question \x1b[2J\x07[red]",
        "chosen": "\x9b31m yes, of course",
        "rejected": "no",
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    build(own.parent / "recipes" / "quickstart.toml", store=own)
    _, page, _ = cli("why", "quickstart@v2", "a question", "--store", str(own))
    assert "a question ␛[2J␇[red]" in page
    assert not set(page) & {"\x1b", "\x07", "\x9b"}


# diff


def test_diff_counts_rows_by_reason_and_names_the_changed_keys(cli):
    code, page, _ = cli("diff", "quickstart@v1", "quickstart@v2")
    assert code == 0
    assert re.match(r"quickstart@v1 302 rows → quickstart@v2 \d+ rows\n1 came, \d+ went, \d+ moved, 0 changed, ", page)
    assert re.search(r"^filter\.min_margin +0\.0 → 1\.0$", page, re.MULTILINE)
    assert re.search(r"^sources\.openhermes\.take +\(absent\) → 50$", page, re.MULTILINE)
    assert re.search(r"^mix/not_sampled +openhermes +recipe +43  ━+", page, re.MULTILINE)
    assert re.search(r"^preference +orca +train → test +\d+$", page, re.MULTILINE)


def test_diff_of_another_file_names_it_and_the_rows(cli):
    _, page, _ = cli("diff", "quickstart@v1", "quickstart@v3")
    assert re.search(r"^ultrafeedback +changed +quickstart/ultrafeedback.jsonl$", page, re.MULTILINE)
    assert re.search(r"^no longer in the source +ultrafeedback +source files +1", page, re.MULTILINE)
    assert re.search(r"^new in the source +ultrafeedback +source files +1", page, re.MULTILINE)
    assert re.search(
        r"^[0-9a-f]{12}  ultrafeedback  new in the source  What is a row that was added later\?$", page, re.MULTILINE
    )
    assert re.search(r"^ultrafeedback +chosen_score +1$", page, re.MULTILINE)


def test_diff_as_json_has_every_row_and_counts_that_agree(cli):
    found = json.loads(cli("diff", "quickstart@v1", "quickstart@v2", "--json")[1])
    for name in ("came", "went"):
        assert sum(row["copies"] for row in found[name]) == found["counts"][name]
    assert found["counts"]["came"] + found["counts"]["stayed"] == found["b"]["rows"]
    assert found["counts"]["went"] + found["counts"]["stayed"] == found["a"]["rows"]
    assert {"key": "filter.min_margin", "old": 0.0, "new": 1.0} in found["recipe"]
    limited = json.loads(cli("diff", "quickstart@v1", "quickstart@v2", "--json", "--limit", "2")[1])
    assert (len(limited["went"]), limited["counts"]) == (2, found["counts"])


def test_the_same_digest_is_one_line(cli):
    code, page, _ = cli("diff", "quickstart@v1", "quickstart@v1")
    assert code == 0
    assert re.fullmatch(r"quickstart@v1 and quickstart@v1 have the same rows: digest [0-9a-f]{12}\n", page)


# drops


def test_drops_counts_first_and_says_what_to_do_next(cli):
    code, page, _ = cli("drops", "quickstart@v1")
    assert code == 0
    assert page.startswith("quickstart@v1  42 of 344 rows read are not in it\n")
    assert re.search(r"^filter/tie +3 +0\.9%  ━*╸? +ultrafeedback 3$", page, re.MULTILINE)
    assert "prefmix drops quickstart@v1 --reason decontaminate/pubquiz" in page


def test_drops_lists_the_rows_of_a_reason_with_file_row_and_evidence(cli):
    _, page, _ = cli("drops", "quickstart@v1", "--reason", "filter/inverted")
    assert "2 of 344 rows read: the rejected answer has the higher score" in page
    assert re.search(
        r"^[0-9a-f]{12}  quickstart/ultrafeedback.jsonl:25 +chosen 2.5, rejected 4.25$", page, re.MULTILINE
    )


def test_drops_lists_a_source_by_reason_and_says_how_many_more(cli):
    _, page, _ = cli("drops", "quickstart@v1", "--source", "openhermes", "--limit", "6")
    assert page.startswith("quickstart@v1  13 of 106 rows read from openhermes are not in it\n")
    assert "filter/empty  a turn is empty" in page
    assert "\n7 more: --limit 13\n" in page


def test_drops_as_json_has_the_whole_ledger(cli, versions):
    found = json.loads(cli("drops", "quickstart@v1", "--json")[1])
    assert (found["dropped"], len(found["rows"]), sum(each["rows"] for each in found["counts"])) == (42, 42, 42)
    tie = next(row for row in found["rows"] if row["reason"] == "filter/tie")
    assert tie["detail"] == {"chosen_score": 4.0, "rejected_score": 4.0}
    one = json.loads(cli("drops", "quickstart@v1", "--json", "--source", "orca", "--reason", "dedupe")[1])
    assert [(row["source"], row["reason"]) for row in one["rows"]] == [
        ("orca", "dedupe/near"),
        ("orca", "dedupe/pair"),
    ]


def test_a_reason_without_rows_is_said_and_one_that_is_none_is_refused(cli):
    assert cli("drops", "quickstart@v1", "--reason", "filter/margin")[:2] == (
        0,
        "No row was dropped for filter/margin.\n",
    )
    code, _, complaints = cli("drops", "quickstart@v1", "--reason", "filter/tei")
    assert code == 2
    assert "there is no reason filter/tei (did you mean filter/tie?). quickstart@v1 has: source/invalid, " in complaints
    code, _, complaints = cli("drops", "quickstart@v1", "--source", "orcas")
    assert (code, complaints) == (
        2,
        "error: quickstart@v1 has no source orcas; it has orca, ultrafeedback, openhermes.\n",
    )


# why


def test_why_tells_of_a_dropped_row_its_reason_evidence_and_texts(cli):
    code, page, _ = cli("why", "quickstart@v1", "cef9c4b24bcd")
    assert code == 0
    assert "cef9c4b24bcd51c378c4d4ad190c652b  is not in quickstart@v1" in page
    assert "ultrafeedback (preference) · quickstart/ultrafeedback.jsonl:14" in page
    assert "filter/tie  chosen and rejected have the same score\nchosen 4, rejected 4\n" in page


def test_why_tells_of_a_kept_row_its_place_and_what_went_for_it(cli):
    _, page, _ = cli("why", "quickstart@v1", "Which ocean lies between Africa and Australia?")
    assert "  is in quickstart@v1\n" in page
    assert re.search(r"^source +orca \(preference\) · quickstart/orca.jsonl$", page, re.MULTILINE)
    assert re.search(r"^split +train, row \d+$", page, re.MULTILINE)
    assert re.search(r"^instead of +dedupe/pair quickstart/ultrafeedback.jsonl:100$", page, re.MULTILINE)


def test_why_tells_of_a_swap(cli):
    _, page, _ = cli("why", "quickstart@v2", "Explain how a bill becomes law")
    assert re.search(
        r"^changed +swap: chosen 2\.5, rejected 4\.25  \(quickstart/ultrafeedback.jsonl:25\)$", page, re.MULTILINE
    )


def test_why_lists_several_rows(cli):
    code, page, _ = cli("why", "quickstart@v1", "bread")
    assert code == 0
    assert page.startswith("5 rows have it\n")
    assert re.search(
        r"^cef9c4b24bcd  ultrafeedback  filter/tie  How do I keep fresh bread from going stale\?$", page, re.MULTILINE
    )


def test_why_as_json_has_the_stories(cli):
    found = json.loads(cli("why", "quickstart@v1", "bread", "--json")[1])
    assert found["found"] == len(found["rows"]) == 5
    assert [row["in_mixture"] for row in found["rows"]] == [True] * 4 + [False]
    dropped = found["rows"][4]["dropped"][0]
    assert (dropped["reason"], dropped["source_row"]) == ("filter/tie", 14)
    assert dropped["row"]["parts"]["prompt"][0]["content"].startswith("How do I keep fresh bread")


@pytest.mark.parametrize("arguments", [("zebra crossing",), ("ffffffffffff",), ("zebra crossing", "--json")])
def test_why_says_when_there_is_no_such_row(cli, arguments):
    code, page, complaints = cli("why", "quickstart@v1", *arguments)
    assert (code, page) == (1, "")
    assert (
        complaints == f"error: No row that quickstart@v1 was made from has {arguments[0]!r} as its id or in its text.\n"
    )


def test_why_needs_something_to_look_for(cli):
    assert cli("why", "quickstart@v1", "  ")[0] == 2


# list and rm


def test_list_names_every_version(cli):
    code, page, _ = cli("list")
    assert code == 0
    assert re.search(
        r"^quickstart +v1 +302  [0-9a-f]{12}  \d{4}-\d\d-\d\d \d\d:\d\d UTC +\d+ kB$",
        page,
        re.MULTILINE,
    )
    versions = json.loads(cli("list", "--json")[1])
    assert [(each["name"], each["version"]) for each in versions] == [("quickstart", f"v{n}") for n in (1, 2, 3)]
    assert versions[0]["rows"] == {"preference": 209, "sft": 93}


def test_an_empty_store_says_what_to_do(cli, tmp_path):
    code, page, _ = cli("list", "--store", str(tmp_path / "nothing"))
    assert code == 0
    assert page.startswith(f"No mixtures in {tmp_path / 'nothing'}.\n")
    assert "prefmix build RECIPE" in page
    assert cli("list", "--store", str(tmp_path), "--json")[1] == "[]\n"


def test_rm_needs_yes_where_it_cannot_ask(own):
    done = process("rm", "quickstart", store=own, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert re.match(r"error: rm quickstart would remove quickstart@v1 \(302 rows, \d+ kB\): .*Give --yes", done.stderr)
    assert open_mixture("quickstart", own).is_whole()


@pytest.mark.parametrize(("answer", "gone"), [(b"y\n", True), (b"n\n", False), (b"\n", False)])
def test_rm_asks_on_a_terminal(own, answer, gone):
    control, terminal = pty.openpty()
    try:
        os.write(control, answer)
        done = process("rm", "quickstart", store=own, stdin=terminal)
    finally:
        os.close(control)
        os.close(terminal)
    assert done.returncode == 0
    assert "Remove it? [y/N]" in done.stderr
    assert (Store(own).versions("quickstart") == {}) is gone


def test_rm_removes_one_version_and_its_label_stays_taken(cli, own):
    folder = open_mixture("quickstart", own).folder
    code, page, said = cli("rm", "quickstart@v1", "--yes", "--store", str(own))
    assert (code, page) == (0, "")
    assert said.startswith("Removed quickstart@v1 (302 rows, ")
    assert str(folder) in said
    assert not folder.exists()
    assert build(own.parent / "recipes" / "quickstart.toml", store=own).version == "v2"
    code, _, complaints = cli("show", "quickstart@v1", "--store", str(own))
    assert (code, "quickstart@v1 was removed on " in complaints) == (1, True)


def test_rm_quietly_says_nothing(cli, own):
    assert cli("rm", "quickstart", "-y", "-q", "--store", str(own)) == (0, "", "")


def test_rm_leaves_a_folder_alone_that_no_store_knows(cli, own, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(open_mixture("quickstart", own).folder, copy)
    code, _, complaints = cli("rm", str(copy), "--yes")
    assert (code, "that no store knows" in complaints, copy.exists()) == (2, True, True)


def test_rm_of_a_damaged_version_works(cli, own):
    mixture = open_mixture("quickstart", own)
    (mixture.folder / "sft" / "train-00000-of-00001.arrow").unlink()
    code, _, complaints = cli("show", "quickstart", "--store", str(own))
    assert code == 1
    assert "sft/train-00000-of-00001.arrow is missing. Remove this version with `prefmix rm`" in complaints
    assert cli("rm", "quickstart", "--yes", "--store", str(own))[0] == 0


@pytest.mark.parametrize("harm", ["no manifest", "half a manifest", "no folder"])
def test_a_version_whose_manifest_is_damaged_is_listed_and_can_be_removed_or_built_again(cli, own, harm):
    folder = open_mixture("quickstart", own).folder
    recipe = own.parent / "recipes" / "quickstart.toml"

    def damage() -> None:
        if harm == "half a manifest":
            (folder / "mixture.json").write_text("{")
        elif harm == "no manifest":
            (folder / "mixture.json").unlink()
        else:
            shutil.rmtree(folder)

    damage()
    assert "quickstart  v1       broken" in cli("list", "--store", str(own))[1]
    assert build(recipe, store=own).version == "v1"
    assert open_mixture("quickstart", own).is_whole()
    damage()
    code, _, said = cli("rm", "quickstart", "--yes", "--store", str(own))
    assert (code, said) == (0, f"Removed quickstart@v1 (damaged): {folder}\n")
    assert Store(own).versions("quickstart") == {}
    assert build(recipe, store=own).version == "v2"


# References that cannot be opened


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("nope", "There is no mixture nope in the store"),
        ("quickstart@v9", "quickstart@v9 does not exist. Versions of quickstart: v1, v2, v3."),
        ("Not A Name", "Not A Name is neither a mixture's folder"),
        ("quickstart@abc", "quickstart@abc does not exist"),
    ],
)
@pytest.mark.parametrize("command", [("show",), ("drops",), ("why", "x"), ("diff", "quickstart")])
def test_a_reference_that_means_nothing_says_what_there_is(cli, command, reference, said):
    name, *others = command
    arguments = (name, *others, reference) if name == "diff" else (name, reference, *others)
    code, page, complaints = cli(*arguments)
    assert (code, page) == (1, "")
    assert said in complaints


def test_a_prefix_that_two_versions_have_is_refused(cli, own):
    labels = own / "quickstart" / "versions.json"
    entries = json.loads(labels.read_text())
    entries["v2"] = entries["v1"] | {"build": entries["v1"]["build"][:6] + "000000"}
    labels.write_text(json.dumps(entries))
    code, _, complaints = cli("show", f"quickstart@{entries['v1']['build'][:6]}", "--store", str(own))
    assert (code, "could be v1 or v2" in complaints) == (1, True)


def test_a_folder_that_is_no_mixture_or_of_a_newer_prefmix_is_refused(cli, own, tmp_path):
    code, _, complaints = cli("show", str(tmp_path))
    assert (code, "is neither a mixture's folder" in complaints) == (1, True)
    folder = open_mixture("quickstart", own).folder
    manifest = json.loads((folder / "mixture.json").read_text())
    (folder / "mixture.json").write_text(json.dumps(manifest | {"format": 99}))
    code, _, complaints = cli("show", str(folder))
    assert (code, "upgrade prefmix" in complaints) == (1, True)
    (folder / "mixture.json").write_text("{")
    code, _, complaints = cli("show", str(folder))
    assert (code, "cannot be read" in complaints) == (1, True)


def test_a_folder_is_a_reference_too(cli, versions):
    folder = open_mixture("quickstart@v2", versions).folder
    assert cli("show", str(folder), "--json")[1] == cli("show", "quickstart@v2", "--json")[1]


def test_the_next_commands_name_a_mixture_by_its_folder_where_the_store_has_not_got_it(cli, versions, tmp_path):
    folder = open_mixture("quickstart@v2", versions).folder
    assert "  prefmix drops quickstart@v2 " in cli("show", str(folder))[1]
    elsewhere = cli("show", str(folder), "--store", str(tmp_path))[1]
    assert f"  prefmix drops {folder} --store {tmp_path}" in elsewhere
