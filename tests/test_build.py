"""The whole pipeline: what a build promises, on hand-written rows and on the real ones."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import datasets
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prefmix
from prefmix.build import curate
from prefmix.errors import BuildError, RecipeError, UsageError
from prefmix.plan import plan
from prefmix.store import Store

WORDS = ["river", "house", "lamp", "green", "walk", "quiet", "seven", "paper", "stone", "bread"]


def pairs(count: int, seed: int = 0) -> list[dict]:
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(draw.choices(WORDS, k=8)).capitalize() + "."

    return [
        {"system": "", "question": f"{sentence()} {n}?", "chosen": sentence(), "rejected": sentence()}
        for n in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(folder: Path, body: str = "", path: str = "rows/*") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.toml"
    file.write_text(
        f'name = "mix"\n[sources.orca]\nformat = "orca_dpo_pairs"\npath = "{path}"\n{body}', encoding="utf-8"
    )
    return file


def built(folder: Path, body: str = "", **options) -> prefmix.Mixture:
    return prefmix.build(recipe(folder, body, **options), store=folder / "store")


def content(mixture: prefmix.Mixture, subset: str = "preference") -> list[dict]:
    return mixture.scan(subset).collect().to_dicts()


def test_a_mixture_has_what_its_manifest_says_and_verifies(tmp_path):
    write_jsonl(tmp_path / "rows" / "a.jsonl", pairs(50))
    mixture = built(tmp_path, "[splits]\ntest = 0.2")
    mixture.verify()
    assert mixture.is_new
    assert str(mixture) == "mix@v1"
    assert mixture.splits == {"preference": ["train", "test"]}
    manifest = mixture.manifest
    assert {entry["rows"] for entry in manifest["subsets"]["preference"].values()} == {
        mixture.scan("preference", split).collect().height for split in ("train", "test")
    }
    assert manifest["sources"]["orca"]["read"] == manifest["sources"]["orca"]["kept"] == 50
    assert {"format", "name", "version", "digest", "recipe_digest", "created", "seed", "subsets", "sources", "funnel", "audit",
            "contamination", "tools"} <= manifest.keys()  # fmt: skip
    assert prefmix.load_recipe(mixture.folder / "recipe.toml").sources.keys() == {"orca"}


def test_building_again_gives_back_what_is_there(tmp_path):
    write_jsonl(tmp_path / "rows" / "a.jsonl", pairs(20))
    first, again = built(tmp_path), built(tmp_path)
    assert not again.is_new
    assert (again.version, again.folder) == (first.version, first.folder)
    assert list(Store(tmp_path / "store").versions("mix")) == ["v1"]


def test_a_changed_file_is_noticed_even_with_the_same_size_and_time(tmp_path):
    file = write_jsonl(tmp_path / "rows" / "a.jsonl", pairs(20))
    before = file.stat()
    first = built(tmp_path)
    file.write_text(file.read_text().replace("House", "Mouse").replace("house", "mouse"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    second = built(tmp_path)
    assert (second.version, second.is_new) == ("v2", True)
    assert second.digest != first.digest


def test_the_digest_does_not_see_order_files_folders_formats_or_days(tmp_path, monkeypatch):
    rows = pairs(60)
    rows += [dict(row) for row in rows[:5]]  # copies: which one stays must not show
    shuffled = random.Random(1).sample(rows, len(rows))
    write_jsonl(tmp_path / "one" / "rows" / "a.jsonl", rows)
    write_jsonl(tmp_path / "two" / "rows" / "z.jsonl", shuffled[:20])
    pl.DataFrame(shuffled[20:]).write_parquet(tmp_path / "two" / "rows" / "b.parquet")
    one, two = built(tmp_path / "one"), built(tmp_path / "two")
    assert one.digest == two.digest
    assert one.build != two.build
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = prefmix.build(tmp_path / "one" / "recipe.toml", store=elsewhere / "store")
    assert (again.digest, again.build) == (one.digest, one.build)
    for threads in ("1", "2"):
        code = "import prefmix, sys; print(prefmix.build(sys.argv[1], store=sys.argv[2]).digest)"
        command = [sys.executable, "-c", code, str(tmp_path / "one" / "recipe.toml"), str(tmp_path / f"store{threads}")]
        run = subprocess.run(
            command, env={**os.environ, "POLARS_MAX_THREADS": threads}, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == one.digest


def test_the_digest_sees_one_character_of_one_kept_row_and_nothing_of_a_dropped_one(tmp_path):
    rows = [*pairs(30), {"system": "", "question": "Same?", "chosen": "Yes.", "rejected": "Yes. "}]
    digests = []
    for number, (place, text) in enumerate([(0, None), (7, "Another lamp."), (30, "Yes.  ")]):
        changed = [dict(row) for row in rows]
        changed[place]["rejected"] = text or changed[place]["rejected"]
        write_jsonl(tmp_path / str(number) / "rows" / "a.jsonl", changed)
        digests.append(built(tmp_path / str(number)).digest)
    assert digests[0] == digests[2]
    assert digests[0] != digests[1]


def test_rows_that_compete_are_decided_by_their_content(tmp_path):
    rated = {"instruction": "Which?", "chosen_response": "This.", "rejected_response": "That."}
    rows = [
        {**rated, "chosen_avg_rating": high, "rejected_avg_rating": low}
        for high, low in ((4.0, 1.0), (5.0, 2.0), (4.5, 1.0))
    ]
    scores = set()
    for number in range(3):
        folder = tmp_path / str(number)
        write_jsonl(folder / "rows" / "a.jsonl", rows[number:] + rows[:number])
        file = recipe(folder)
        file.write_text(file.read_text().replace("orca_dpo_pairs", "ultrafeedback_binarized"))
        mixture = prefmix.build(file, store=folder / "store")
        scores.add(tuple(mixture.scan("preference").select("chosen_score", "rejected_score").collect().row(0)))
    assert scores == {(4.5, 1.0)}


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["<|im_end|>", "Yes.", "", "I'm sorry, but I can't help."]
)
record = st.fixed_dictionaries({"system": text, "question": text, "chosen": text | st.none(), "rejected": text})


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(record, min_size=1, max_size=12),
    take=st.integers(0, 8),
    exact=st.sampled_from(["pair", "prompt", "off"]),
)
def test_every_row_is_kept_or_in_the_ledger_with_a_reason(tmp_path_factory, rows, take, exact):
    folder = tmp_path_factory.mktemp("conserve")
    write_jsonl(folder / "rows" / "a.jsonl", rows)
    curated = curate(plan(prefmix.load_recipe(recipe(folder, f'take = {take}\n[dedupe]\nexact = "{exact}"'))))
    frame, kept = curated.rows["preference"], curated.kept["preference"]
    assert frame.height == len(rows)
    alive = frame.filter(pl.col("reason").is_null())
    assert alive["source_row"].sort().to_list() == kept["source_row"].sort().to_list()
    assert kept.height <= take
    funnel = curated.tally.funnel()
    assert [stage["in"] for stage in funnel[1:]] == [stage["out"] for stage in funnel[:-1]]
    assert funnel[0]["in"] - sum(sum(stage["dropped"].values()) for stage in funnel) == kept.height


def test_both_layouts_open_with_datasets_and_polars_and_hold_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    system = [{"system": "Be brief.", "question": "Why?", "chosen": "Because.\n", "rejected": "No idea"}]
    write_jsonl(tmp_path / "rows" / "a.jsonl", pairs(30) + system)
    chats = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in WORDS]
    write_jsonl(tmp_path / "chats" / "b.jsonl", chats)
    source = '[sources.chats]\nformat = "openhermes"\npath = "chats/*"\n[splits]\ntest = 0.3\n'
    as_text = built(tmp_path, source)
    as_messages = built(tmp_path, source + '[format]\nlayout = "messages"')
    for mixture in (as_text, as_messages):
        for subset in ("preference", "sft"):
            loaded = datasets.load_dataset(str(mixture.folder), subset)
            assert {split: len(rows) for split, rows in loaded.items()} == {
                split: entry["rows"] for split, entry in mixture.manifest["subsets"][subset].items()
            }
            for split, rows in loaded.items():
                scanned = pl.scan_ipc(mixture.folder / subset / f"{split}-*.arrow").collect()
                assert rows.to_list() == scanned.to_dicts() == mixture.scan(subset, split).collect().to_dicts()
                assert mixture.dataset_dict(subset)[split].to_list() == rows.to_list()
    row = next(row for row in content(as_messages) if row["chosen"][0]["content"] == "Because.\n")
    assert row["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    rendered = next(other for other in content(as_text) if other["id"] == row["id"])
    assert (
        rendered["prompt"]
        == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered["chosen"] == "Because.\n<|im_end|>"


@pytest.mark.parametrize("layout", ["text", "messages"])
def test_a_mixture_read_back_as_a_source_gives_the_same_mixture(tmp_path, layout):
    write_jsonl(tmp_path / "rows" / "a.jsonl", pairs(30))
    first = built(tmp_path, f'[format]\nlayout = "{layout}"')
    again = tmp_path / "again"
    again.mkdir()
    (again / "recipe.toml").write_text(
        f'name = "mix"\n[sources.orca]\nformat = "messages"\npath = "{first.folder}/preference/*.arrow"\n[format]\nlayout = "{layout}"'
    )
    second = prefmix.build(again / "recipe.toml", store=tmp_path / "other")
    assert second.digest == first.digest


def test_what_trl_checks_of_a_data_set_holds(tmp_path):
    trl = pytest.importorskip("trl.data_utils", reason="trl is not installed (extra train)")
    write_jsonl(tmp_path / "rows" / "a.jsonl", pairs(5))
    for layout, conversational in (("text", False), ("messages", True)):
        row = content(built(tmp_path, f'[format]\nlayout = "{layout}"'))[0]
        example = {name: row[name] for name in ("prompt", "chosen", "rejected")}
        assert trl.is_conversational(example) is conversational


def test_injected_system_prompts_are_refused_by_name(tmp_path):
    write_jsonl(tmp_path / "rows" / "a.jsonl", pairs(5))
    with pytest.raises(UsageError, match=r"format\.system"):
        built(tmp_path, '[format]\nsystem = "<|im_end|>"')


def test_a_recipe_that_leaves_no_row_says_what_removed_them(tmp_path):
    write_jsonl(tmp_path / "rows" / "a.jsonl", pairs(5))
    with pytest.raises(BuildError, match=r"No row is left.*filter/min_chars 5"):
        built(tmp_path, "[filter]\nmin_chars = 5000")
    assert not list((tmp_path / "store").rglob("mixture.json"))


def test_a_source_whose_rows_are_all_dropped_between_two_others_is_no_trouble(tmp_path):
    chats = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(3000)]
    for name, suffix in (("a", ""), ("b", "<|endoftext|>"), ("c", "")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{**c, "output": f"{name} {c['output']}{suffix}"} for c in chats])
    (tmp_path / "recipe.toml").write_text(
        'name = "mix"\n' + "".join(f'[sources.{n}]\nformat = "openhermes"\npath = "{n}.jsonl"\n' for n in "abc")
    )
    mixture = prefmix.build(tmp_path / "recipe.toml", store=tmp_path / "store")
    assert {name: entry["kept"] for name, entry in mixture.manifest["sources"].items()} == {
        "a": 3000,
        "b": 0,
        "c": 3000,
    }


def test_invalid_rows_before_valid_ones_are_no_trouble(tmp_path):
    row = {"system": "Be brief.", "question": "Why?", "chosen": "So.", "rejected": "No."}
    write_jsonl(tmp_path / "rows" / "a.jsonl", [{**row, "chosen": None}] * 2 + [row])
    write_jsonl(tmp_path / "rows" / "b.jsonl", [{**row, "rejected": None}])
    assert built(tmp_path).manifest["sources"]["orca"]["dropped"] == {"source/invalid": 3}


def test_repeat_has_a_line_of_its_own_in_the_funnel(tmp_path):
    write_jsonl(tmp_path / "rows" / "a.jsonl", pairs(10))
    mixture = built(tmp_path, "repeat = 2\ntake = 4")
    assert mixture.funnel[-2:] == [
        {"stage": "mix", "in": 10, "dropped": {"mix/not_sampled": 6}, "out": 4},
        {"stage": "repeat", "in": 4, "dropped": {}, "added": 4, "out": 8},
    ]
    assert mixture.scan("preference").collect()["id"].value_counts()["count"].to_list() == [2] * 4


def test_a_tampered_file_is_named(tmp_path):
    write_jsonl(tmp_path / "rows" / "a.jsonl", pairs(20))
    mixture = built(tmp_path)
    file = next((mixture.folder / "preference").glob("*.arrow"))
    data = bytearray(file.read_bytes())
    data[data.index(b"assistant")] ^= 1
    file.write_bytes(data)
    with pytest.raises(prefmix.PrefmixError, match=file.name):
        prefmix.open_mixture(mixture.folder).verify()


def test_a_mixture_with_a_missing_file_is_built_again_in_place(tmp_path):
    write_jsonl(tmp_path / "rows" / "a.jsonl", pairs(20))
    first = built(tmp_path)
    next((first.folder / "preference").glob("*.arrow")).unlink()
    second = built(tmp_path)
    second.verify()
    assert (second.version, second.digest, second.is_new) == ("v1", first.digest, True)


@pytest.mark.slow
def test_a_store_survives_being_killed_at_any_moment(tmp_path):
    write_jsonl(tmp_path / "rows" / "a.jsonl", pairs(20000))
    file = recipe(tmp_path)
    expected = prefmix.build(file, store=tmp_path / "reference").digest
    store = tmp_path / "store"
    code = "import prefmix, sys; print('ready', flush=True); prefmix.build(sys.argv[1], store=sys.argv[2])"
    draw = random.Random(7)
    killed = 0
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-c", code, str(file), str(store)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.uniform(0.2, 1.6))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        for name in Store(store).names():
            prefmix.open_mixture(name, store).verify()
    assert killed >= 5
    mixture = prefmix.build(file, store=store)
    mixture.verify()
    assert mixture.digest == expected
    assert list(Store(store).versions("mix")) == ["v1"]
    assert [path.name for path in (store / "mix").iterdir() if path.name.startswith(".staging")] == []


def test_two_builds_at_once_give_one_version(tmp_path):
    write_jsonl(tmp_path / "rows" / "a.jsonl", pairs(3000))
    code = "import prefmix, sys; print(prefmix.build(sys.argv[1], store=sys.argv[2]))"
    command = [sys.executable, "-c", code, str(recipe(tmp_path)), str(tmp_path / "store")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert {process.communicate()[0].strip() for process in processes} == {"mix@v1"}
    prefmix.open_mixture("mix", tmp_path / "store").verify()


# The real rows.

REAL = {
    "intel": ("orca_dpo_pairs/real_intel_rows.parquet", 205),
    "orca": ("orca_dpo_pairs/converted.parquet", 13573),
    "hh_orca": ("orca_dpo_pairs/converted_hh_harmless.parquet", 1597),
    "uf": ("ultrafeedback_binarized/real_ultrafeedback_rows.parquet", 810),
    "alpaca": ("ultrafeedback_binarized/converted_alpaca_eval.parquet", 20052),
    "other": ("ultrafeedback_binarized/converted_other_scored.parquet", 2812),
    "flip": ("ultrafeedback_binarized/upstream/label_flip_20.jsonl", 677),
    "prometheus": ("ultrafeedback_binarized/ultrafeedback_raw_shape.prometheus.jsonl", 54),
    "hh": ("preference_raw/hh-rlhf/*.jsonl", 200),
    "lf_dpo": ("preference_raw/llama_factory_dpo_en_demo.json", 299),
    "foundry": ("orca_dpo_pairs/upstream/foundry_orca_dpo_validation.jsonl", 205),
    "hermes": ("openhermes/converted_hermes_sources.parquet", 38714),
    "t0": ("openhermes/converted_t0_p3.parquet", 37574),
    "tldr": ("openhermes/upstream_t0_cnn_dailymail_tldr.jsonl", 200),
    "fastchat": ("openhermes/sharegpt/fastchat_dummy_conversation.json", 359),
    "glaive": ("openhermes/sharegpt/llama_factory_glaive_toolcall_en.json", 191),
}


@pytest.fixture(scope="module")
def real(real_data, tmp_path_factory) -> prefmix.Mixture:
    folder = tmp_path_factory.mktemp("real")
    lines = ['name = "real"'] + [f'[sources.{name}]\npath = "{real_data / path}"' for name, (path, _) in REAL.items()]
    (folder / "recipe.toml").write_text("\n".join(lines))
    return prefmix.build(folder / "recipe.toml", store=folder / "store")


def dropped(real: prefmix.Mixture, reason: str) -> Mapping[str, int]:
    return {name: entry["dropped"].get(reason, 0) for name, entry in real.manifest["sources"].items()}


def test_every_real_row_is_kept_or_dropped_with_a_reason(real):
    real.verify()
    ledger = dict(real.drops.group_by("source").len().collect().rows())
    kept = {subset: real.scan(subset).collect() for subset in real.splits}
    for name, (_, rows) in REAL.items():
        entry = real.manifest["sources"][name]
        assert entry["read"] == rows
        assert rows == entry["kept"] + sum(entry["dropped"].values())
        assert ledger.get(name, 0) == sum(entry["dropped"].values())
        assert (
            entry["kept"]
            == kept["preference" if entry["kind"] == "preference" else "sft"].filter(pl.col("source") == name).height
        )


def test_the_counts_of_known_defects_are_those_of_the_files(real, real_data):
    """Counted here by other means, on the files as they are; SOURCES.md tells of 964 empty outputs and of a file whose
    200 completions all end with a special token."""
    assert dropped(real, "filter/empty")["t0"] == 964
    assert dropped(real, "filter/injection")["tldr"] == 200
    assert dropped(real, "source/invalid") == dict.fromkeys(REAL, 0)
    uf = pl.read_parquet(real_data / REAL["uf"][0])
    chosen, rejected = pl.col("chosen_response"), pl.col("rejected_response")
    tokens = r"<\|[a-z_]+\|>|</?s>|\[/?INST\]"
    special = pl.any_horizontal(pl.col("instruction", "chosen_response", "rejected_response").str.contains(tokens))
    blank = pl.any_horizontal(
        pl.col("instruction", "chosen_response", "rejected_response").str.contains(r"^[\s\u{200b}]*$")
    )
    same = chosen.str.strip_chars() == rejected.str.strip_chars()
    tied = pl.col("chosen_avg_rating") == pl.col("rejected_avg_rating")
    assert dropped(real, "filter/injection")["uf"] == uf.filter(special).height == 4
    assert dropped(real, "filter/empty")["uf"] == uf.filter(blank & ~special).height
    assert dropped(real, "filter/identical")["uf"] == uf.filter(same & ~blank & ~special).height == 5
    assert dropped(real, "filter/tie")["uf"] == uf.filter(tied & ~same & ~blank & ~special).height
    # An anchored expression of ours: no refusal among T0's completions, more than "cannot help" alone in alpaca_eval,
    # because it also takes "As an AI language model, I don't have ...".
    refusals = dropped(real, "filter/refusal")
    assert refusals["t0"] == 0
    assert 0.03 < refusals["orca"] / REAL["orca"][1] < 0.06
    assert refusals["alpaca"] / REAL["alpaca"][1] < 0.02


def test_the_same_rows_in_other_upstream_shapes_are_duplicates(real):
    assert dropped(real, "dedupe/pair")["foundry"] == 204
    survivors = (
        real.drops.filter((pl.col("source") == "foundry") & (pl.col("reason") == "dedupe/pair"))
        .select("kept_id")
        .collect()
    )
    kept = real.scan("preference").filter(pl.col("source") == "intel").select("id").collect()
    assert set(survivors["kept_id"]) <= set(kept["id"])


def test_no_prompt_of_the_real_mixture_is_in_two_splits(real):
    prompts = (
        real.scan("preference")
        .select("split", p=pl.col("prompt").str.to_lowercase().str.replace_all(r"\s+", " "))
        .collect()
    )
    assert prompts.group_by("p").agg(pl.col("split").n_unique())["split"].max() == 1
    share = prompts.filter(pl.col("split") == "test").height / prompts.height
    assert 0.005 < share < 0.05


def test_recipes_that_are_wrong_raise_before_anything_is_read(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('name = "x"\n[sorces.a]\npath = "a"\n')
    with pytest.raises(RecipeError, match="sorces"):
        prefmix.build(file)
