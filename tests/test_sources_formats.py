"""Every format on a few rows written by hand, and on the real files beside the repository."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmix import chatml
from prefmix.sources import Source, resolve
from prefmix.sources.hh_rlhf import turns


def source_of(folder: Path, rows: list[dict[str, Any]] | str, **keys: Any) -> Source:
    if not isinstance(rows, str):
        (folder / "rows.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    defaults = {"format": None, "hub": None, "path": rows if isinstance(rows, str) else "rows.jsonl", "split": None}
    defaults |= {"revision": "main", "columns": {}, "where": None, "exclude": None, "license": None, "options": {}}
    return resolve("test", SimpleNamespace(**{**defaults, **keys}), folder)


def read(folder: Path, rows: list[dict[str, Any]], seed: int = 0, meta: bool = False, **keys: Any) -> pl.DataFrame:
    return source_of(folder, rows, **keys).read(seed, meta=meta)


def said(table: pl.DataFrame, part: str) -> list[Any]:
    """A MESSAGES column as [(role, content), ...] a row."""
    return [None if row is None else [(turn["role"], turn["content"]) for turn in row] for row in table[part]]


def errors(table: pl.DataFrame) -> list[str | None]:
    return [None if detail is None else json.loads(detail)["error"] for detail in table["detail"]]


U, A = "user", "assistant"


def messages(*turns: tuple[str, str | None]) -> list[dict[str, str | None]]:
    return [{"role": role, "content": content} for role, content in turns]


# --- openhermes, orca_dpo_pairs, ultrafeedback_binarized -------------------------------------------------------------


def test_openhermes_puts_the_input_on_the_line_after_the_instruction(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Translate.", "input": "Hallo", "output": "Hello"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say ho.", "input": None, "output": ""},
        {"instruction": "Say hi.", "system": "Be brief.", "output": "hi"},
    ]
    table = read(tmp_path, rows)
    assert said(table, "messages") == [
        [(U, "Translate.\nHallo"), (A, "Hello")],
        [(U, "Say hi."), (A, "hi")],
        [(U, "Say ho."), (A, "")],
        [("system", "Be brief."), (U, "Say hi."), (A, "hi")],
    ]


def test_orca_rows_without_a_system_column_have_no_system_message(tmp_path: Path) -> None:
    table = read(tmp_path, [{"question": "2 + 2?", "chosen": "4", "rejected": "5"}])
    assert said(table, "prompt") == [[(U, "2 + 2?")]]


BINARIZED = {
    "argilla": {"instruction": "q", "chosen_response": "a", "rejected_response": "b", "source": "x"}
    | {"chosen_avg_rating": 4.5, "rejected_avg_rating": 2, "chosen_model": None},
    "cleaned": {"prompt": "q", "chosen": messages((U, "q"), (A, "a")), "rejected": messages((U, "q"), (A, "b"))}
    | {"chosen-rating": 4.5, "rejected-rating": 2, "chosen-model": "m", "source": "x"},
    "H4": {"prompt": "q", "chosen": messages((U, "q"), (A, "a")), "rejected": messages((U, "q"), (A, "b"))}
    | {"score_chosen": 4.5, "score_rejected": 2, "prompt_id": "1", "messages": messages((U, "q"), (A, "a"))},
    "trl-lib": {"chosen": messages((U, "q"), (A, "a")), "rejected": messages((U, "q"), (A, "b"))}
    | {"score_chosen": 4.5, "score_rejected": 2},
    "text": {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 4.5, "score_rejected": 2},
}


@pytest.mark.parametrize("shape", BINARIZED)
def test_binarized_ultrafeedback_is_the_same_pair_in_every_shape(tmp_path: Path, shape: str) -> None:
    source = source_of(tmp_path, [BINARIZED[shape]])
    table = source.read(0)
    assert source.format == "ultrafeedback_binarized"
    assert [said(table, part) for part in ("prompt", "chosen", "rejected")] == [
        [[(U, "q")]],
        [[(A, "a")]],
        [[(A, "b")]],
    ]
    assert table.select("chosen_score", "rejected_score").row(0) == (4.5, 2.0)
    plain = read(tmp_path, [{"question": "q", "chosen": "a", "rejected": "b"}])
    assert table["id"].item() == plain["id"].item()


def test_scores_may_be_missing_or_null(tmp_path: Path) -> None:
    row = {"instruction": "q", "chosen_response": "a", "rejected_response": "b"}
    table = read(tmp_path, [row, {**row, "chosen_avg_rating": 1, "rejected_avg_rating": None}])
    assert table["chosen_score"].to_list() == [None, 1.0]
    assert errors(table) == [None, None]


# --- ultrafeedback ---------------------------------------------------------------------------------------------------


def completion(response: str | None, score: float | None, ratings: list[int] | None = None) -> dict[str, Any]:
    found = {"model": "m", "response": response, "overall_score": score, "critique": "..."}
    if ratings:
        aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
        found["annotations"] = {
            aspect: {"Rating": str(rating) if rating else "N/A", "Rationale": "..."}
            for aspect, rating in zip(aspects, ratings, strict=True)
        }
    return found


def pair(table: pl.DataFrame) -> list[tuple[str | None, str | None]]:
    return [
        (chosen and chosen[0][1], rejected and rejected[0][1])
        for chosen, rejected in zip(said(table, "chosen"), said(table, "rejected"), strict=True)
    ]


def test_the_best_completion_is_chosen_against_a_lower_one(tmp_path: Path) -> None:
    row = {
        "instruction": "q",
        "completions": [completion("c", 3), completion("a", 8), completion("b", 5), completion("d", 1)],
    }
    lowest = read(tmp_path, [row], options={"rejected": "lowest"})
    assert pair(lowest) == [("a", "d")]
    assert lowest.select("chosen_score", "rejected_score").row(0) == (8.0, 1.0)
    seen = {pair(read(tmp_path, [row], seed=seed))[0] for seed in range(40)}
    assert seen == {("a", "b"), ("a", "c"), ("a", "d")}


@settings(max_examples=20)
@given(st.permutations([("a", 4.0), ("b", 4.0), ("c", 2.0), ("d", 2.0)]), st.permutations(["q1", "q2", "q3"]))
def test_the_pair_does_not_depend_on_the_order_of_completions_or_rows(
    tmp_path_factory: pytest.TempPathFactory, completions: list[tuple[str, float]], questions: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("rows")

    def pairs(completions: list[tuple[str, float]], questions: list[str]) -> set[tuple[Any, ...]]:
        rows = [{"instruction": q, "completions": [completion(*each) for each in completions]} for q in questions]
        table = read(folder, rows, seed=7)
        return set(zip(table["prompt"].list.first().struct.field("content"), pair(table), table["id"], strict=True))

    straight = [("a", 4.0), ("b", 4.0), ("c", 2.0), ("d", 2.0)]
    assert pairs(completions, questions) == pairs(straight, ["q1", "q2", "q3"])


def test_equal_scores_are_a_tie_and_too_few_completions_an_invalid_row(tmp_path: Path) -> None:
    rows = [
        {"instruction": "tie", "completions": [completion("a", 5), completion("b", 5)]},
        {"instruction": "one", "completions": [completion("a", 5)]},
        {"instruction": "none", "completions": []},
        {"instruction": "unscored", "completions": [completion("a", None), completion("b", 5)]},
        {"instruction": "null", "completions": [completion("a", 2), completion("b", 5), None]},
        {"instruction": "silent", "completions": [completion(None, 2), completion("b", 5)]},
    ]
    table = read(tmp_path, rows)
    assert set(pair(table)[0]) == {"a", "b"}
    assert table["chosen_score"][0] == table["rejected_score"][0] == 5.0
    few = "fewer than 2 completions with a response and a known score"
    assert errors(table) == [
        None,
        few,
        "completions is empty",
        few,
        "an item of completions is null",
        "an item of completions: response is null",
    ]
    assert table["source_row"].to_list() == list(range(6))


def test_a_score_of_10_that_was_a_1_is_put_right_by_the_aspect_ratings(tmp_path: Path) -> None:
    others = [completion("good", 8), completion("fair", 6)]
    rows = [
        {"instruction": "was a 1", "completions": [completion("bad", 10, [1, 2, 1, 1]), *others]},
        {"instruction": "is a 10", "completions": [completion("best", 10, [5, 4, 5, 0]), *others]},
        {"instruction": "unclear", "completions": [completion("unclear", 10, [3, 3, 3, 3]), *others]},
        {"instruction": "unrated", "completions": [completion("unrated", 10), *others]},
    ]
    table = read(tmp_path, rows, options={"rejected": "lowest"})
    assert pair(table) == [("good", "bad"), ("best", "fair"), ("good", "fair"), ("unrated", "fair")]
    assert table["rejected_score"][0] == 1.0
    changed = {"scores_of_10_read_as_1": 1, "scores_of_10_left_out": 0}
    left_out = {"scores_of_10_read_as_1": 0, "scores_of_10_left_out": 1}
    notes = [None if meta is None else json.loads(meta) for meta in table["meta"]]
    assert notes == [{"prefmix": changed}, None, {"prefmix": left_out}, None]
    rows = [{**row, "source": "evol"} for row in rows]
    whole = [json.loads(meta) for meta in read(tmp_path, rows, meta=True)["meta"]]
    assert whole[0] == {"source": "evol", "prefmix": changed}
    assert whole[1] == {"source": "evol"}


def test_the_mean_that_upstream_stored_counts_before_the_ratings(tmp_path: Path) -> None:
    doubtful = completion("bad", 10) | {"fine-grained_score": 1.5}
    table = read(tmp_path, [{"instruction": "q", "completions": [doubtful, completion("good", 2)]}])
    assert pair(table) == [("good", "bad")]


# --- sharegpt --------------------------------------------------------------------------------------------------------


def turns_of(*pairs: tuple[str, str | None]) -> list[dict[str, str | None]]:
    return [{"from": who, "value": value} for who, value in pairs]


def test_sharegpt_speakers_become_roles(tmp_path: Path) -> None:
    rows = [
        {"conversations": turns_of(("system", "s"), ("human", "h"), ("gpt", "g"))},
        {"conversations": turns_of(("user", "h"), ("function_call", "{}"), ("observation", "[]"), ("ChatGPT", "g"))},
        {"conversations": turns_of(("human", "h")), "system": "s"},
        {"conversations": turns_of(("system", "own"), ("human", "h"), ("gpt", "g")), "system": "s"},
        {"conversations": turns_of(("human", "h"), ("alien", "x"))},
        {"conversations": turns_of(("human", "h"), ("gpt", None))},
        {"conversations": []},
        {"conversations": [*turns_of(("human", "h")), {"value": "x"}]},
    ]
    table = read(tmp_path, rows)
    assert said(table, "messages")[:4] == [
        [("system", "s"), (U, "h"), (A, "g")],
        [(U, "h"), (A, "{}"), ("tool", "[]"), (A, "g")],
        [("system", "s"), (U, "h")],
        [("system", "own"), (U, "h"), (A, "g")],
    ]
    assert errors(table) == [
        *[None] * 4,
        'unknown role "alien" in conversations',
        "an item of conversations: value is null",
        "conversations is empty",
        "an item of conversations: from is null",
    ]
    assert table["messages"].is_null().to_list() == [False] * 4 + [True] * 4


def test_sharegpt_pairs_answer_the_conversation(tmp_path: Path) -> None:
    row = {"conversations": turns_of(("human", "h")), "chosen": {"from": "gpt", "value": "a"}}
    rows = [{**row, "rejected": {"from": "gpt", "value": "b"}, "system": "s"}, {**row, "rejected": {"from": "gpt"}}]
    table = read(tmp_path, [*rows, {**row, "rejected": None}])
    assert said(table, "prompt")[0] == [("system", "s"), (U, "h")]
    assert (said(table, "chosen")[0], said(table, "rejected")[0]) == ([(A, "a")], [(A, "b")])
    assert errors(table) == [None, "rejected: value is null", "rejected is null"]


# --- hh_rlhf ---------------------------------------------------------------------------------------------------------


def test_hh_transcripts_share_the_prompt(tmp_path: Path) -> None:
    shared = "\n\nHuman: hi\n\nwith a gap\n\nAssistant: hello\n\nHuman: more\n\nAssistant:"
    rows = [
        {"chosen": f"{shared} a", "rejected": f"{shared} b\n\nc "},
        {"chosen": f"{shared} a", "rejected": "\n\nHuman: hi\n\nAssistant: other\n\nHuman: more\n\nAssistant: b"},
        {"chosen": "no speaker", "rejected": f"{shared} b"},
        {"chosen": "\n\nHuman: alone", "rejected": "\n\nHuman: alone"},
        {"chosen": f"{shared}", "rejected": f"{shared} b"},
    ]
    table = read(tmp_path, rows)
    assert said(table, "prompt")[0] == [(U, "hi\n\nwith a gap"), (A, "hello"), (U, "more")]
    assert pair(table) == [("a", "b\n\nc"), (None, None), (None, None), (None, None), ("", "b")]
    assert errors(table) == [
        None,
        "chosen and rejected diverge before the last answer",
        'chosen does not begin with "Human:"',
        "chosen has no answer after its first turn",
        None,
    ]


PLAIN = (
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)
    .map(str.strip)
    .filter(lambda text: "Human:" not in text and "Assistant:" not in text)
)


@given(st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=4))
def test_a_transcript_gives_back_its_turns(exchanges: list[tuple[str, str]]) -> None:
    text = "".join(f"\n\nHuman: {human}\n\nAssistant: {assistant}" for human, assistant in exchanges)
    parsed = pl.DataFrame({"text": [text]}).select(turns(pl.col("text")).alias("turns"))
    stripped = pl.DataFrame({"content": [content for both in exchanges for content in both]}).select(
        pl.col("content").str.strip_chars()  # Polars' white space, which is not quite Python's
    )
    roles = [role for _ in exchanges for role in (U, A)]
    assert said(parsed, "turns") == [list(zip(roles, stripped["content"], strict=True))]


# --- messages --------------------------------------------------------------------------------------------------------

Q, ANSWER, OTHER = messages((U, "q")), messages((A, "a")), messages((A, "b"))


def rendered(turns: list[dict[str, Any]]) -> str:
    return "\n".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>" for turn in turns)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": Q, "chosen": ANSWER, "rejected": OTHER},
        {"prompt": Q, "chosen": Q + ANSWER, "rejected": Q + OTHER},
        {"prompt": "q", "chosen": ANSWER, "rejected": OTHER},
        {"prompt": "q", "chosen": Q + ANSWER, "rejected": Q + OTHER},
        {"prompt": Q, "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"chosen": Q + ANSWER, "rejected": Q + OTHER},
        {"chosen": rendered(Q + ANSWER), "rejected": rendered(Q + OTHER) + "\n"},
        {"prompt": f"{rendered(Q)}\n<|im_start|>assistant\n", "chosen": "a<|im_end|>", "rejected": "b<|im_end|>"},
        {"prompt": rendered(Q), "chosen": rendered(ANSWER), "rejected": rendered(OTHER)},
        {"input": {"messages": Q, "tools": []}, "preferred_output": ANSWER, "non_preferred_output": OTHER},
    ],
)
def test_a_pair_is_the_same_in_every_form(tmp_path: Path, row: dict[str, Any]) -> None:
    source = source_of(tmp_path, [row, row], format="messages")
    table = source.read(0)
    assert source.kind == "preference"
    assert errors(table) == [None, None]
    assert [said(table, part)[0] for part in ("prompt", "chosen", "rejected")] == [[(U, "q")], [(A, "a")], [(A, "b")]]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": Q + ANSWER},
        {"prompt": Q, "completion": ANSWER},
        {"prompt": "q", "completion": "a"},
        {"prompt": f"{rendered(Q)}\n<|im_start|>assistant\n", "completion": "a<|im_end|>"},
        {"text": rendered(Q + ANSWER)},
        {"text": rendered(Q + ANSWER) + "\n"},
    ],
)
def test_a_conversation_is_the_same_in_every_form(tmp_path: Path, row: dict[str, Any]) -> None:
    source = source_of(tmp_path, [row])
    assert (source.format, source.kind) == ("messages", "sft")
    assert said(source.read(0), "messages") == [[(U, "q"), (A, "a")]]


def test_a_system_message_in_both_conversations_belongs_to_the_prompt(tmp_path: Path) -> None:
    system = messages(("system", "s"))
    row = {"prompt": "q", "chosen": system + Q + ANSWER, "rejected": system + Q + OTHER}
    table = read(tmp_path, [row])
    assert said(table, "prompt") == [[("system", "s"), (U, "q")]]


def test_pairs_that_cannot_be_told_apart_are_invalid(tmp_path: Path) -> None:
    table = read(
        tmp_path,
        [
            {"prompt": "q", "chosen": Q + ANSWER, "rejected": messages((U, "other")) + OTHER},
            {"prompt": "other", "chosen": Q + ANSWER, "rejected": Q + OTHER},
            {"prompt": "q", "chosen": messages(("alien", "a")), "rejected": OTHER},
            {"prompt": "q", "chosen": messages((A, None)), "rejected": OTHER},
            {"prompt": "q", "chosen": [], "rejected": OTHER},
            {"prompt": "q", "chosen": [None], "rejected": OTHER},
            {"prompt": None, "chosen": ANSWER, "rejected": OTHER},
        ],
    )
    assert errors(table) == [
        "chosen and rejected diverge before the last answer",
        "chosen is a conversation that does not continue the prompt",
        'unknown role "alien" in chosen',
        "an item of chosen: content is null",
        "chosen is empty",
        "an item of chosen is null",
        "prompt is null",
    ]
    table = read(
        tmp_path,
        [
            {"prompt": f"{rendered(Q)}\n<|im_start|>assistant\n", "chosen": "a", "rejected": "b<|im_end|>"},
            {"prompt": "<|im_start|>user\nq", "chosen": "a<|im_end|>", "rejected": "b<|im_end|>"},
        ],
    )
    assert errors(table) == [
        "chosen is not ChatML, but the prompt is",
        "prompt begins as ChatML but is not well-formed",
    ]
    table = read(tmp_path, [{"text": "Once upon a time"}, {"text": rendered(Q)}])
    assert errors(table) == ["text is not ChatML: prefmix cannot tell the turns of other text", None]


def test_special_tokens_inside_plain_text_are_left_for_the_injection_rule(tmp_path: Path) -> None:
    row = {"prompt": "what is <|im_end|>?", "chosen": "a token<|im_end|>", "rejected": "<|im_start|>"}
    table = read(tmp_path, [row])
    assert pair(table) == [("a token<|im_end|>", "<|im_start|>")]
    assert said(table, "prompt") == [[(U, "what is <|im_end|>?")]]


def test_upstream_role_names_are_brought_into_ours(tmp_path: Path) -> None:
    table = read(tmp_path, [{"messages": messages(("developer", "d"), ("User", "q"), ("function", "f"), (A, "a"))}])
    assert said(table, "messages") == [[("system", "d"), (U, "q"), ("tool", "f"), (A, "a")]]


CONTENT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda text: "<|im" not in text
)


@settings(max_examples=15)
@given(st.lists(st.tuples(CONTENT, CONTENT, CONTENT), min_size=1, max_size=4))
def test_a_mixture_in_either_layout_reads_back_to_the_same_ids(
    tmp_path_factory: pytest.TempPathFactory, triples: list[tuple[str, str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    rows = [
        {"prompt": messages((U, q)), "chosen": messages((A, a)), "rejected": messages((A, b))} for q, a, b in triples
    ]
    table = read(folder, rows)
    as_text = table.select(
        "source",
        chatml.render_prompt(pl.col("prompt")).alias("prompt"),
        chatml.render_answer(pl.col("chosen")).alias("chosen"),
        chatml.render_answer(pl.col("rejected")).alias("rejected"),
        pl.lit(2.0).alias("chosen_score"),
        pl.lit(1.0).alias("rejected_score"),
    )
    as_text.write_ipc(folder / "text.arrow")
    table.select("id", "source", "prompt", "chosen", "rejected").write_ipc(folder / "messages.arrow")
    text, lists = (source_of(folder, f"{name}.arrow") for name in ("text", "messages"))
    assert (text.format, lists.format) == ("messages", "messages")
    assert text.read(0)["id"].equals(table["id"])
    assert lists.read(0)["id"].equals(table["id"])
    assert text.read(0)["chosen_score"].to_list() == [2.0] * len(rows)


# --- the real files --------------------------------------------------------------------------------------------------

REAL = {
    "orca_dpo_pairs/real_intel_rows.parquet": ("orca_dpo_pairs", 205),
    "orca_dpo_pairs/converted.parquet": ("orca_dpo_pairs", 13_573),
    "orca_dpo_pairs/converted_hh_harmless.parquet": ("orca_dpo_pairs", 1_597),
    "orca_dpo_pairs/upstream/foundry_orca_dpo_validation.jsonl": ("messages", 205),
    "ultrafeedback_binarized/real_ultrafeedback_rows.parquet": ("ultrafeedback_binarized", 810),
    "ultrafeedback_binarized/converted_alpaca_eval.parquet": ("ultrafeedback_binarized", 20_052),
    "ultrafeedback_binarized/converted_other_scored.parquet": ("ultrafeedback_binarized", 2_812),
    "ultrafeedback_binarized/ultrafeedback_raw_shape.prometheus.jsonl": ("ultrafeedback", 54),
    "ultrafeedback_binarized/upstream/label_flip_20.jsonl": ("messages", 677),
    "openhermes/converted_hermes_sources.parquet": ("openhermes", 38_714),
    "openhermes/converted_t0_p3.parquet": ("openhermes", 37_574),
    "openhermes/sharegpt/fastchat_dummy_conversation.json": ("sharegpt", 359),
    "openhermes/sharegpt/llama_factory_glaive_toolcall_en.json": ("sharegpt", 191),
    "openhermes/upstream_t0_cnn_dailymail_tldr.jsonl": ("messages", 200),
    "preference_raw/llama_factory_dpo_en_demo.json": ("sharegpt", 299),
    "preference_raw/hh-rlhf/harmless-base-test.sample200.jsonl": ("hh_rlhf", 200),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_told_by_their_columns_and_read_in_full(real_data: Path, name: str) -> None:
    source = source_of(real_data, name)
    table = source.read(0)
    assert (source.format, table.height) == REAL[name]
    assert source.count_rows() == (table.height if name.endswith(".parquet") else None)
    assert table["reason"].null_count() == table.height
    assert table["id"].str.len_chars().unique().to_list() == [32]


def test_the_same_real_rows_in_two_upstream_formats_have_the_same_ids(real_data: Path) -> None:
    intel = source_of(real_data, "orca_dpo_pairs/real_intel_rows.parquet").read(0)
    openai = source_of(real_data, "orca_dpo_pairs/upstream/foundry_orca_dpo_validation.jsonl").read(0)
    assert intel["id"].equals(openai["id"])


def test_real_hh_transcripts_are_the_dialogues_that_were_converted_from_them(real_data: Path) -> None:
    sample = source_of(real_data, "preference_raw/hh-rlhf/harmless-base-test.sample200.jsonl").read(0)
    converted = source_of(real_data, "orca_dpo_pairs/converted_hh_harmless.parquet").read(0)
    assert set(pair(sample)) & set(pair(converted))
