"""Questions asked of mixtures: lengths, samples, dropped rows with their texts, the story of a row, differences."""

from __future__ import annotations

import json
import re
import shutil
from hashlib import sha256
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prefmix
from prefmix import inspect
from prefmix.build import build
from prefmix.errors import MixtureError
from prefmix.inspect.diff import FEWER, GONE, MORE, NEW, diff
from prefmix.ledger import CHANGES, LEDGER
from prefmix.mixture import Mixture, columns, write_split
from prefmix.recipe import load_recipe
from prefmix.store import Store, open_mixture

PACKAGE = Path(prefmix.__file__).parent


@pytest.fixture(scope="module")
def v1(versions) -> Mixture:
    return open_mixture("quickstart@v1", versions)


@pytest.fixture(scope="module")
def v2(versions) -> Mixture:
    return open_mixture("quickstart@v2", versions)


@pytest.fixture(scope="module")
def v3(versions) -> Mixture:
    return open_mixture("quickstart@v3", versions)


@pytest.fixture
def moved(versions, tmp_path) -> Mixture:
    """quickstart@v1 whose sources are in a folder of the test's own."""
    build(copied(versions, tmp_path), store=tmp_path / "store")
    return open_mixture("quickstart", tmp_path / "store")


def copied(versions: Path, folder: Path) -> Path:
    shutil.copytree(versions.parent / "recipes", folder / "recipes")
    return folder / "recipes" / "quickstart.toml"


# Reasons


def test_every_reason_that_the_code_gives_has_a_sentence():
    literal = re.compile(r'"((?:source|filter|decontaminate|dedupe|mix)/[a-z_]+)"')
    files = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "inspect"]
    given_ = {reason for path in files for reason in literal.findall(path.read_text(encoding="utf-8"))}
    limits = {
        f"filter/{name}" for name in ("max_tokens", "max_prompt_tokens", "max_answer_tokens", "min_chars", "max_chars")
    }
    assert len(given_) > 15
    assert (given_ | limits) <= set(inspect.SENTENCES)


@pytest.mark.parametrize(
    ("reason", "detail", "words"),
    [
        ("filter/tie", {"chosen_score": 4.0, "rejected_score": 4.0}, "chosen 4, rejected 4"),
        ("filter/injection", {"tokens": ["</s>", "[INST]"]}, "holds </s>, [INST]"),
        ("filter/max_tokens", {"tokens": 4096, "limit": 2048}, "4,096 tokens, limit 2,048"),
        (
            "filter/max_chars",
            {"part": "prompt", "characters": 9000, "limit": 8000},
            "prompt: 9,000 characters, limit 8,000",
        ),
        ("filter/empty", {"part": "prompt"}, "the prompt is empty"),
        ("filter/refusal", {"opening": "I cannot"}, "“I cannot”"),
        ("filter/max_length_ratio", {"ratio": 7.25}, "ratio 7.25"),
        ("source/invalid", {"error": "bad", "line": 1200, "column": 7, "text": "{"}, "line 1,200, column 7: bad: {"),
        ("source/invalid", {"error": "chosen is null"}, "chosen is null"),
        ("dedupe/pair", {"copies": 2}, "2 rows with the same content"),
        ("dedupe/prompt_cap", {"copies": 5}, "5 rows with the same prompt"),
        ("dedupe/near", {"jaccard": 0.8125, "cluster": "ab12"}, "Jaccard similarity 0.812"),
        (
            "decontaminate/quiz",
            {"item": "q.csv:3", "field": "a", "part": "chosen", "rule": "ngram", "coverage": 0.604, "text": "of the"},
            "chosen holds 60% of q.csv:3 (ngram): “of the”",
        ),
        ("mix/not_sampled", {"rows": 1000, "wanted": 50}, "50 rows wanted of 1,000"),
        ("theirs/odd", {"x": 1, "y": "z"}, "x 1, y z"),
    ],
)
def test_evidence_is_told_in_words(reason, detail, words):
    assert inspect.evidence(reason, json.dumps(detail)) == words


@pytest.mark.parametrize(("detail", "words"), [(None, ""), ("not json", "not json"), ("[1]", "[1]")])
def test_evidence_that_is_no_object_is_shown_as_it_is(detail, words):
    assert inspect.evidence("theirs/odd", detail) == words


def test_all_evidence_of_the_quickstart_has_words(v1):
    for reason, detail in v1.drops.select("reason", "detail").collect().rows():
        assert (inspect.evidence(reason, detail) != "") == (detail is not None)
        assert "{" not in inspect.evidence(reason, detail) or reason == "source/invalid"


def test_a_reason_means_itself_and_a_stage_all_of_its_reasons():
    present = {"filter/tie": 3, "filter/empty": 1, "dedupe/pair": 2}
    assert inspect.matching("filter/tie", present) == ["filter/tie"]
    assert inspect.matching("filter", present) == inspect.matching("filter/", present) == ["filter/tie", "filter/empty"]
    assert inspect.matching(None, present) == list(present)
    assert inspect.matching("filter/margin", present) == []
    with pytest.raises(LookupError, match=r"no reason filter/tei.*did you mean filter/tie"):
        inspect.matching("filter/tei", present)


# What is in a mixture


def test_histograms_count_every_row_and_measure_the_contents_without_marks(v1):
    found = inspect.lengths(v1)
    assert [(each.subset, each.part) for each in found] == [
        ("preference", "prompt"), ("preference", "chosen"), ("preference", "rejected"), ("sft", "messages"),
    ]  # fmt: skip
    chosen = next(each for each in found if each.part == "chosen")
    texts = v1.scan("preference").collect()["chosen"].to_list()
    characters = sorted(len(text.removesuffix("<|im_end|>")) for text in texts)
    assert chosen.unit == "characters"
    assert chosen.longest == characters[-1]
    assert chosen.median in characters[len(characters) // 2 - 1 : len(characters) // 2 + 1]
    for each in found:
        assert sum(each.counts) == (209 if each.subset == "preference" else 93)
        assert len(each.edges) == len(each.counts) + 1
        assert each.edges == sorted(set(each.edges))


def test_lengths_do_not_depend_on_the_layout(versions, v1, tmp_path):
    path = copied(versions, tmp_path)
    other = build(load_recipe(path, ["format.layout=messages"]), store=tmp_path / "store")
    assert inspect.lengths(other) == inspect.lengths(v1)


def test_lengths_are_in_tokens_where_the_mixture_has_counted_them(versions, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = copied(versions, tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (path.parent / "words").mkdir()
    tokenizer.save(str(path.parent / "words" / "tokenizer.json"))
    mixture = build(load_recipe(path, ["format.tokenizer=words"]), store=tmp_path / "store")
    found = {each.part: each for each in inspect.lengths(mixture)}
    assert {each.unit for each in found.values()} == {"tokens"}
    assert found["chosen"].longest == mixture.scan("preference").select(pl.col("chosen_tokens").max()).collect().item()


def test_the_overview_can_be_written_as_json(v1):
    found = inspect.overview(v1)
    assert json.loads(json.dumps(found)) == found | {"lengths": json.loads(json.dumps(found["lengths"]))}
    assert found["rows_by_source"] == {name: entry["kept"] for name, entry in v1.manifest["sources"].items()}
    assert found["size_bytes"] == sum(path.stat().st_size for path in v1.folder.rglob("*") if path.is_file())


def test_rows_by_source_count_copies(versions, tmp_path):
    path = copied(versions, tmp_path)
    mixture = build(load_recipe(path, ["sources.orca.repeat=3"]), store=tmp_path / "store")
    assert inspect.rows_by_source(mixture)["orca"] == 3 * mixture.manifest["sources"]["orca"]["kept"]


def test_a_listing_goes_on_after_a_version_that_cannot_be_opened(moved):
    store = Store(moved.folder.parent.parent)
    assert [(each.version, sum(each.rows.values())) for each in inspect.listing(store)] == [("v1", 302)]
    (moved.folder / "mixture.json").unlink()
    (broken,) = inspect.listing(store)
    assert "has no mixture.json" in (broken.problem or "")


@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_a_file_that_is_missing_or_cut_short_is_named(moved, harm):
    path = moved.folder / "sft" / "train-00000-of-00001.arrow"
    inspect.check_whole(moved)
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(MixtureError, match=r"sft/train-00000-of-00001.arrow is (missing|not as long)"):
        inspect.check_whole(moved)


# Samples and texts


@settings(max_examples=15)
@given(few=st.integers(1, 40), more=st.integers(0, 302))
def test_a_smaller_sample_is_the_beginning_of_a_larger_one(versions, few, more):
    mixture = open_mixture("quickstart@v1", versions)
    small, large = inspect.sample(mixture, few), inspect.sample(mixture, few + more)
    assert [row.id for row in large][:few] == [row.id for row in small]
    assert len({row.id for row in large}) == len(large) == min(few + more, 302)


def test_a_sample_has_rows_of_all_subsets_and_splits_in_their_turns(v1):
    rows = inspect.sample(v1, 302)
    assert {(row.kind, row.split) for row in rows} == {(k, s) for k in ("preference", "sft") for s in ("train", "test")}
    for row in rows:
        last = [turns[-1]["role"] for part, turns in row.parts.items() if part != "prompt"]
        assert set(last) == {"assistant"}


def test_texts_are_the_same_from_both_layouts(versions, v1, tmp_path):
    path = copied(versions, tmp_path)
    other = build(load_recipe(path, ["format.layout=messages"]), store=tmp_path / "store")
    assert inspect.sample(other, 20) == inspect.sample(v1, 20)


def test_a_text_that_holds_special_tokens_is_shown_as_it_is(versions, tmp_path):
    path = copied(versions, tmp_path)
    mixture = build(load_recipe(path, ["filter.injection=report"]), store=tmp_path / "store")
    injected = mixture.scan("preference").filter(pl.col("rejected").str.contains("<|im_end|><|im_end|>", literal=True))
    (each,) = injected.select("id").collect()["id"].to_list()
    row = inspect.kept_rows(mixture, [each])[each]
    assert row.parts["rejected"][0]["role"] == "text"
    assert row.parts["rejected"][0]["content"].endswith("<|im_end|><|im_end|>")


def test_dropped_rows_have_the_texts_of_their_source(v1, versions):
    entries = inspect.sample_drops(v1, ["filter/tie"], 10)
    dropped, problems = inspect.dropped_rows(v1, entries)
    lines = (versions.parent / "recipes/quickstart/ultrafeedback.jsonl").read_text(encoding="utf-8").splitlines()
    assert problems == []
    assert len(dropped) == 3
    for each in dropped:
        line = json.loads(lines[each.entry["source_row"]])
        assert each.row is not None
        assert each.row.parts["prompt"][-1]["content"] == line["instruction"]
        assert each.row.parts["chosen"][0]["content"] == line["chosen_response"]
        assert each.row.scores["chosen_score"] == each.row.scores["rejected_score"]


def test_a_duplicate_comes_with_the_row_that_was_kept(v1):
    dropped, _ = inspect.dropped_rows(v1, inspect.sample_drops(v1, ["dedupe/pair"], 10))
    assert len(dropped) == 4
    for each in dropped:
        assert each.row is not None
        assert each.kept is not None
        assert each.kept.id == each.entry["kept_id"]
        assert each.kept.parts == each.row.parts
        assert each.kept_reason is None


def test_a_kept_row_that_was_dropped_later_says_why(versions, tmp_path):
    path = copied(versions, tmp_path)
    mixture = build(load_recipe(path, ["sources.openhermes.take=1"]), store=tmp_path / "store")
    dropped, _ = inspect.dropped_rows(
        mixture, mixture.drops.filter(pl.col("reason") == "dedupe/pair", source="openhermes").collect()
    )
    assert [(each.kept, each.kept_reason) for each in dropped] == [(None, "mix/not_sampled")]


def test_a_source_that_is_gone_is_told_and_the_ledger_remains(moved):
    (moved.folder.parents[2] / "recipes/quickstart/orca.jsonl").unlink()
    entries = moved.drops.filter(pl.col("reason").is_in(["filter/tie", "filter/refusal"])).collect()
    dropped, problems = inspect.dropped_rows(moved, entries)
    assert len(problems) == 1
    assert problems[0].startswith("source orca cannot be read again: quickstart/orca.jsonl: no such file")
    texts = {(each.entry["source"], each.row is not None) for each in dropped}
    assert texts == {("orca", False), ("ultrafeedback", True), ("openhermes", True)}


def test_a_source_that_has_changed_gives_the_rows_it_still_has(moved):
    path = moved.folder.parents[2] / "recipes/quickstart/ultrafeedback.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[15:]) + "\n", encoding="utf-8")  # row 14, a tie, is gone; the others have moved
    dropped, problems = inspect.dropped_rows(moved, inspect.sample_drops(moved, ["filter/tie"], 10))
    changed = "quickstart/ultrafeedback.jsonl has changed since the build"
    assert problems == [f"source ultrafeedback: 1 of its rows can no longer be found: {changed}"]
    assert {each.entry["source_row"]: each.row is not None for each in dropped} == {14: False, 56: True, 69: True}


def test_rows_that_do_not_fit_their_format_have_evidence_and_no_texts(moved):
    shutil.rmtree(moved.folder.parents[2] / "recipes/quickstart")  # nothing is read for them
    dropped, problems = inspect.dropped_rows(moved, inspect.sample_drops(moved, ["source/invalid"], 10))
    assert problems == []
    assert [each.row for each in dropped] == [None] * 4
    assert all(inspect.evidence(each.entry["reason"], each.entry["detail"]) for each in dropped)


# One row


def test_a_kept_row_is_found_by_the_beginning_of_its_id_and_knows_its_place(v1):
    row = v1.scan("preference", "test").collect().row(5, named=True)
    stories, count, problems = inspect.why(v1, row["id"][:8].upper())
    assert (count, problems) == (1, [])
    assert stories[0].id == row["id"]
    assert stories[0].places == [{"subset": "preference", "split": "test", "row": 5}]
    assert stories[0].dropped == []


def test_a_survivor_knows_the_rows_that_were_dropped_for_it(v1):
    entry = v1.drops.filter(reason="dedupe/pair", source="ultrafeedback", source_row=100).collect().row(0, named=True)
    (story,), _, _ = inspect.why(v1, entry["kept_id"])
    assert story.row is not None
    assert story.row.source == "orca"
    assert [each["source_row"] for each in story.instead_of] == [100]


def test_a_dropped_row_is_found_by_its_text_in_any_case(v1):
    stories, count, _ = inspect.why(v1, "FRESH bread FROM going")
    assert count == 1
    assert [each.entry["reason"] for each in stories[0].dropped] == ["filter/tie"]
    assert stories[0].row is None


def test_text_that_looks_like_an_id_is_searched_when_no_id_begins_so(versions, v1):
    stories, count, _ = inspect.why(v1, "decade")
    assert count == len(stories) > 0
    for row in (story.row or story.dropped[0].row for story in stories):
        assert row is not None
        assert "decade" in json.dumps(row.parts).lower()


def test_text_is_taken_as_it_is_not_as_a_pattern(v1):
    assert inspect.why(v1, "[insert company name]")[1] == 1
    assert inspect.why(v1, "br.ad")[1] == 0


def test_an_invalid_row_is_found_by_its_evidence(v1):
    entry = v1.drops.filter(reason="source/invalid", source_row=15).collect().row(0, named=True)
    text = json.loads(entry["detail"])["text"][30:60]
    stories, _, _ = inspect.why(v1, text)
    assert [story.id for story in stories] == [entry["id"]]


def test_a_row_that_was_swapped_says_so(v2):
    (change,) = v2.changes.filter(source_row=25).collect().to_dicts()
    (story,), _, _ = inspect.why(v2, change["id"])
    assert [each["change"] for each in story.changes] == ["swap"]
    assert story.row is not None
    assert story.row.scores == {"chosen_score": 4.25, "rejected_score": 2.5}


def test_every_row_of_the_ledger_has_a_story(v1):
    entries = v1.drops.collect()
    stories, problems = [], []
    for each in entries["id"].unique().to_list():
        (story,), _, unread = inspect.why(v1, each)
        stories.append(story)
        problems += unread
    assert problems == []
    assert sum(len(story.dropped) for story in stories) == entries.height


def test_only_the_first_stories_are_told_and_all_are_counted(v1):
    stories, count, _ = inspect.why(v1, "the", limit=3)
    assert (len(stories), count > 100) == (3, True)


# Differences


def test_a_mixture_does_not_differ_from_itself(v1):
    found = diff(v1, v1)
    assert found.is_empty
    assert (found.recipe, found.files, found.stayed) == ([], [], 302)


def test_another_recipe_says_which_keys_and_which_rows_by_reason(v1, v2):
    found = diff(v1, v2)
    changed = {change.key: (change.old, change.new) for change in found.recipe}
    assert changed == {
        "filter.min_margin": (0.0, 1.0), "filter.on_inverted": ("drop", "swap"),
        "sources.openhermes.take": (None, 50), "splits.test": (0.05, 0.3),
    }  # fmt: skip
    assert found.files == []
    assert set(found.went["reason"]) == {"filter/margin", "mix/not_sampled"}
    assert set(found.came["reason"]) == {"filter/inverted"}
    assert set(found.went["cause"]) == set(found.came["cause"]) == {"recipe"}
    assert set(found.moved.select("old", "new").rows()) == {("train", "test")}
    assert found.changed.is_empty()


def test_another_file_says_which_rows_are_new_gone_or_rescored(v1, v3):
    found = diff(v1, v3)
    assert found.recipe == []
    assert [(each.source, each.change, each.path) for each in found.files] == [
        ("ultrafeedback", "changed", "quickstart/ultrafeedback.jsonl")
    ]
    assert found.came.select("source", "reason", "cause").rows() == [("ultrafeedback", NEW, "source")]
    assert found.went.select("source", "reason", "cause").rows() == [("ultrafeedback", GONE, "source")]
    assert found.changed.select("source", "columns").rows() == [("ultrafeedback", ["chosen_score"])]


def test_a_changed_benchmark_is_what_made_a_row_come_or_go(versions, v1, tmp_path):
    path = copied(versions, tmp_path)
    benchmark = path.parent / "quickstart" / "benchmark.csv"
    lines = benchmark.read_text(encoding="utf-8").splitlines(keepends=True)
    benchmark.write_text("".join(line for line in lines if "birds" not in line), encoding="utf-8")
    other = build(path, store=tmp_path / "store")
    found = diff(v1, other)
    assert [(each.source, each.change, each.path) for each in found.files] == [
        ("benchmark pubquiz", "changed", "quickstart/benchmark.csv")
    ]
    came = found.came.select("source", "reason", "cause").rows()
    assert came == [("ultrafeedback", "decontaminate/pubquiz", "benchmark")]
    assert diff(other, v1).went.select("source", "reason", "cause").rows() == came
    sha = other.manifest["benchmarks"]["pubquiz"]["files"][0]["sha256"]
    assert sha == sha256(benchmark.read_bytes()).hexdigest()
    without = build(load_recipe(path, ["decontaminate.against={}"]), store=tmp_path / "store")
    assert {cause for reason, cause in diff(v1, without).came.select("reason", "cause").rows()} == {"recipe"}


def test_the_layout_is_no_change_of_rows(versions, v1, tmp_path):
    path = copied(versions, tmp_path)
    other = build(load_recipe(path, ["format.layout=messages"]), store=tmp_path / "store")
    found = diff(v1, other)
    assert found.is_empty
    assert [change.key for change in found.recipe] == ["format.layout"]


def test_repeating_a_source_brings_copies_not_rows(versions, v1, tmp_path):
    path = copied(versions, tmp_path)
    other = build(load_recipe(path, ["sources.orca.repeat=3", "dedupe={exact='off'}"]), store=tmp_path / "store")
    found = diff(v1, other)
    copies = dict(found.came.group_by("reason").agg(pl.col("copies").sum()).rows())
    assert set(copies) == {MORE, "dedupe/pair", "dedupe/near"}
    assert sum(copies.values()) == found.came["copies"].sum() == other.funnel[-1]["out"] - 302
    assert set(diff(other, v1).went["reason"]) == {FEWER, "dedupe/pair", "dedupe/near"}


def test_a_source_that_was_left_out_is_one_change_of_the_recipe(versions, v1, tmp_path):
    path = copied(versions, tmp_path)
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r"\[sources\.orca\].*?\n\n", "", text, flags=re.DOTALL), encoding="utf-8")
    other = build(path, store=tmp_path / "store")
    found = diff(v1, other)
    assert [(change.key, change.old, change.new) for change in found.recipe] == [
        ("sources.orca", "quickstart/orca.jsonl", None)
    ]
    assert set(found.went.select("reason", "cause").rows()) == {("its source was removed", "recipe")}
    # The pair that both sources have is there all the same, from the other one.
    assert found.changed["columns"].to_list() == [["source", "chosen_score", "rejected_score"]]


def test_another_order_of_the_sources_is_named(versions, v1, tmp_path):
    path = copied(versions, tmp_path)
    text = path.read_text(encoding="utf-8")
    orca = text[text.index("[sources.orca]") : text.index("[sources.ultrafeedback]")]
    path.write_text(text.replace(orca, "").replace("[filter]", f"{orca}[filter]"), encoding="utf-8")
    found = diff(v1, build(path, store=tmp_path / "store"))
    assert [change.key for change in found.recipe] == ["sources (order)"]
    assert found.recipe[0].old[0] == "orca"
    assert found.recipe[0].new[-1] == "orca"


def test_a_renamed_file_is_not_one_removed_and_one_added(versions, v1, tmp_path):
    path = copied(versions, tmp_path)
    path.with_name("quickstart").joinpath("orca.jsonl").rename(path.with_name("quickstart") / "pairs.jsonl")
    path.write_text(path.read_text(encoding="utf-8").replace("orca.jsonl", "pairs.jsonl"), encoding="utf-8")
    found = diff(v1, build(path, store=tmp_path / "store"))
    assert [(each.change, each.old_path, each.path) for each in found.files] == [
        ("renamed", "quickstart/orca.jsonl", "quickstart/pairs.jsonl")
    ]
    assert found.is_empty


def test_copies_with_other_scores_are_told_apart(tmp_path):
    recipe = tmp_path / "m.toml"
    recipe.write_text('name = "m"\n[sources.a]\npath = "a.jsonl"\n[dedupe]\nexact = "off"\n')

    def version(*chosen_scores: float) -> Mixture:
        row = {"instruction": "q", "chosen_response": "x", "rejected_response": "y", "rejected_avg_rating": 1.0}
        lines = [json.dumps(row | {"chosen_avg_rating": score}) for score in chosen_scores]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        return build(recipe, store=tmp_path / "store")

    one, other, more = version(2.0, 3.0), version(2.0, 4.0), version(2.0, 3.0, 4.0)
    assert diff(one, other).changed["columns"].to_list() == [["chosen_score"]]
    assert diff(one, other).came.is_empty()
    assert diff(one, more).changed.is_empty()
    assert diff(one, more).came.select("copies", "reason").rows() == [(1, MORE)]


RECIPE = '[sources.a]\npath = "a.jsonl"\n\n[sources.b]\npath = "b.jsonl"\n'
rows_of_a_mixture = st.dictionaries(
    st.integers(0, 6),
    st.one_of(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["train", "test"]), st.sampled_from("xy"), st.integers(1, 3)),
        st.sampled_from(["filter/tie", "dedupe/pair"]),
    ),
)


def written(folder: Path, rows: dict) -> Mixture:
    """A mixture of sft rows by number: (source, split, text, copies), or the reason for which one was dropped."""
    schema = columns("sft", "text", with_tokens=False)
    splits: dict[str, dict] = {}
    for split in ("train", "test"):
        part = [(n, row) for n, row in rows.items() if row[1] == split for _ in range(row[3])]
        if part:
            texts = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": row[2]}] for _, row in part]
            frame = pl.DataFrame(
                {"id": [f"{n:032x}" for n, _ in part], "source": [row[0] for _, row in part], "messages": texts}
            )
            splits[split], _ = write_split(folder, "sft", split, frame, schema)
    dropped = [
        (f"{n:032x}", "a", "a.jsonl", n, "sft", row.partition("/")[0], row, None, None)
        for n, row in rows.items()
        if isinstance(row, str)
    ]
    (folder / "drops").mkdir()
    pl.DataFrame(dropped, schema=LEDGER, orient="row").write_parquet(folder / "drops" / "drops.parquet")
    pl.DataFrame(schema=CHANGES).write_parquet(folder / "drops" / "changes.parquet")
    (folder / "recipe.toml").write_text(RECIPE)
    subsets = {"sft": splits} if splits else {}
    sources = {name: {"files": [{"path": f"{name}.jsonl", "sha256": str(sorted(rows))}]} for name in "ab"}
    return Mixture(folder, {"name": "m", "version": "v1", "subsets": subsets, "sources": sources})


@settings(max_examples=40)
@given(old=rows_of_a_mixture, new=rows_of_a_mixture)
def test_what_came_and_what_stayed_is_all_there_is_and_the_mirror_shows_the_same(tmp_path_factory, old, new):
    folder = tmp_path_factory.mktemp("diff")
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    a, b = written(folder / "a", old), written(folder / "b", new)
    found, mirror = diff(a, b), diff(b, a)
    counts = [{n: row[3] for n, row in rows.items() if not isinstance(row, str)} for rows in (old, new)]

    def ids(table: pl.DataFrame) -> list[int]:
        return sorted(int(each, 16) for each in table["id"])

    assert found.came["copies"].sum() + found.stayed == sum(counts[1].values())
    assert found.went["copies"].sum() + found.stayed == sum(counts[0].values())
    assert ids(found.came) == [n for n in sorted(counts[1]) if counts[1][n] > counts[0].get(n, 0)]
    assert ids(found.went) == [n for n in sorted(counts[0]) if counts[0][n] > counts[1].get(n, 0)]
    both = [n for n in sorted(counts[0]) if n in counts[1]]
    assert ids(found.moved) == [n for n in both if old[n][1] != new[n][1]]
    differing = {
        n: [name for name, place in (("source", 0), ("messages", 2)) if old[n][place] != new[n][place]] for n in both
    }
    assert {int(n, 16): names for n, names in found.changed.select("id", "columns").rows()} == {
        n: names for n, names in differing.items() if names
    }
    for n, reason in found.went.select("id", "reason").rows():
        other = new.get(int(n, 16))
        assert reason == (GONE if other is None else other if isinstance(other, str) else FEWER)
    assert mirror.stayed == found.stayed
    keys = ("subset", "id", "source", "split", "copies")
    assert set(found.came.select(keys).rows()) == set(mirror.went.select(keys).rows())
    assert set(found.went.select(keys).rows()) == set(mirror.came.select(keys).rows())
    assert set(found.moved.select("id", "old", "new").rows()) == set(mirror.moved.select("id", "new", "old").rows())
    assert diff(a, a).is_empty
