"""From a mixture to token ids: they are those of the whole text, each answer ends once, nothing is cut but prompts."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace

import datasets
import polars as pl
import pytest
from canonical import chat, frame, pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import smollm2_tokenizer
from test_tokens import byte_level, metaspace, odd
from tokenizers import Tokenizer

import prefmix
from prefmix import chatml
from prefmix.errors import MixtureError, TrainError
from prefmix.mixture import Mixture, columns, write_split
from prefmix.store import Store
from prefmix.train import data
from prefmix.train.data import tokenize
from prefmix.train.tokenizer import ChatTokenizer, load_tokenizer

START, END = "<|im_start|>", "<|im_end|>"


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> ChatTokenizer:
    folder = smollm2_tokenizer(tmp_path_factory.getbasetemp() / "smollm2-tokenizer")
    return load_tokenizer(str(folder), "main", Path("/"))


@pytest.fixture(scope="module", params=["smollm2", "byte_level", "metaspace", "odd"])
def chat_tokenizer(request, tmp_path_factory) -> ChatTokenizer:
    """SmolLM2, and small ones of three sorts: newlines merge, blanks are put before, blanks are swallowed."""
    if request.param == "smollm2":
        return request.getfixturevalue("smol")
    folder = tmp_path_factory.mktemp(request.param)
    backend = {"byte_level": byte_level, "metaspace": metaspace, "odd": odd}[request.param]()
    backend.add_special_tokens(["<pad>"])
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder), "main", Path("/"), add_tokens=True)


def mixture_of(folder: Path, rows: list[dict], kind: str = "preference", layout: str = "text") -> Mixture:
    """A mixture's folder with one split `train`; its digest is made up of the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    schema = columns(kind, layout, with_tokens=False)
    canonical = frame(rows, kind).with_columns(pl.col("source").cast(pl.String))
    entry, digest = write_split(folder, kind, "train", canonical, schema)
    values = prefmix.mixture.mixture_digest({kind: schema}, {kind: {"train": digest}})
    return Mixture(folder, {"name": "mix", "version": "v1", "digest": values, "subsets": {kind: {"train": entry}}})


def rows_of(mixture: Mixture, kind: str, smol: ChatTokenizer, max_length: int = 4096) -> data.TokenRows:
    return tokenize(mixture, kind, "train", smol, max_length=max_length)


def tokenized(smol: ChatTokenizer, rows: list[dict], kind: str = "preference", layout="text", max_length: int = 4096):
    return rows_of(mixture_of(Path(mkdtemp()) / "mixture", rows, kind, layout), kind, smol, max_length)


def ids(smol: ChatTokenizer, text: str) -> list[int]:
    return smol.tokenizer.encode(text, add_special_tokens=False)


def text_of(smol: ChatTokenizer, tokens: list[int]) -> str:
    return smol.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def messages_of(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


# SmolLM2 has no token for most control characters and drops them. Newlines and blanks at the start of an answer make tokens that reach over the boundary to it.
content = st.builds(
    "".join,
    st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cn", "Cc"]), max_size=8)
        | st.sampled_from(["\n", "\n\n", "\n  x", " ", "Hello", " world", "é", "12", "- a\n- b", "assistant\n"]),
        max_size=4,
    ),
).filter(lambda text: not any(token in text for token in ("<|", "|>", "<repo", "<file", "<gh_", "<issue", "<jupyter")))
question, answer = st.tuples(st.just("user"), content), st.tuples(st.just("assistant"), content)
system = st.lists(st.tuples(st.just("system"), content), max_size=1)


@st.composite
def prompts(draw) -> list[tuple[str, str]]:
    earlier = draw(st.lists(st.tuples(question, answer), max_size=2))
    return [*draw(system), *(turn for exchange in earlier for turn in exchange), draw(question)]


@st.composite
def conversations(draw) -> list[tuple[str, str]]:
    return [*draw(prompts()), draw(answer)]


FEW = settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
MANY = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@MANY
@given(st.lists(st.tuples(prompts(), content, content), min_size=1, max_size=4))
def test_the_ids_of_a_pair_are_those_of_prompt_and_answer_as_one_text_in_both_layouts(smol, drawn):
    rows = [pair(*parts) for parts in drawn]
    found = tokenized(smol, rows)
    assert found.left_out == {}
    texts = frame(rows).select(
        p=chatml.render_prompt(pl.col("prompt")),
        c=chatml.render_answer(pl.col("chosen")),
        r=chatml.render_answer(pl.col("rejected")),
    )
    for row, (p, c, r) in zip(found.table, texts.rows(), strict=True):
        assert row["prompt_ids"] + row["chosen_ids"] == ids(smol, p + c)
        assert row["prompt_ids"] + row["rejected_ids"] == ids(smol, p + r)
        for side in (row["chosen_ids"], row["rejected_ids"]):
            assert (side.count(2), side[-1]) == (1, 2)
        prompt, chosen = text_of(smol, row["prompt_ids"]), text_of(smol, row["chosen_ids"])
        assert prompt + chosen == p + c
        assert p.startswith(prompt)
        assert p.removeprefix(prompt) in ("", "\n")  # the newline of the header may be one with the answer's
    assert found.tokens == sum(len(row[name]) for row in found.table for name in row if name != "id")
    as_messages = tokenized(smol, rows, layout="messages")
    assert as_messages.table.to_list() == found.table.to_list()
    assert found.table["id"] == frame(rows)["id"].to_list()


@MANY
@given(st.lists(conversations(), min_size=1, max_size=4))
def test_the_labels_are_the_answers_and_their_ends_as_the_template_marks_them(smol, drawn):
    rows = [chat(*turns) for turns in drawn]
    found = tokenized(smol, rows, "sft")
    assert found.left_out == {}
    for row, turns in zip(found.table, drawn, strict=True):
        marked = smol.tokenizer.apply_chat_template(
            messages_of(turns), return_dict=True, return_assistant_tokens_mask=True
        )
        assert row["input_ids"] == marked["input_ids"]
        mask = marked["assistant_masks"]
        assert row["labels"] == [token if m else -100 for token, m in zip(row["input_ids"], mask, strict=True)]
        assert row["labels"].count(2) == sum(role == "assistant" for role, _ in turns)
    assert found.tokens == sum(map(len, found.table["input_ids"]))
    assert tokenized(smol, rows, "sft", "messages").table.to_list() == found.table.to_list()


@FEW
@given(st.lists(st.tuples(prompts(), content, content), min_size=1, max_size=4))
def test_stock_trl_gives_the_same_ids_for_text_and_for_conversations(chat_tokenizer, drawn):
    rows = [pair(*parts) for parts in drawn]
    ours = tokenized(chat_tokenizer, rows).table.remove_columns("id").to_list()
    names = ["prompt", "chosen", "rejected"]
    conversational = [{name: row[name] for name in names} for row in rows]
    assert trl(chat_tokenizer, conversational) == ours
    assert trl(chat_tokenizer, texts_of(rows)) == ours


def texts_of(rows: list[dict]) -> list[dict]:
    return frame(rows).select(
        prompt=chatml.render_prompt(pl.col("prompt")),
        chosen=chatml.render_answer(pl.col("chosen")),
        rejected=chatml.render_answer(pl.col("rejected")),
    ).to_dicts()  # fmt: skip


def trl(smol: ChatTokenizer, rows: list[dict]) -> list[dict]:
    """What TRL's own DPOTrainer makes of the rows before it trains on them."""
    from accelerate import PartialState
    from trl import DPOTrainer

    PartialState()
    dummy = SimpleNamespace(_tokenizer=smol.tokenizer)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    datasets.disable_progress_bars()
    made = DPOTrainer._prepare_dataset(dummy, datasets.Dataset.from_list(rows), smol.tokenizer, args, "train")
    return made.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).to_list()


@settings(max_examples=60)
@given(st.text(st.sampled_from("\n ab<|im_start|>end_user"), max_size=40) | st.lists(st.sampled_from(
    [START, END, "\n", "user", "assistant\n", "x"])).map("".join))  # fmt: skip
def test_the_turns_of_a_text_are_found_where_parsing_finds_them(text):
    parsed = pl.DataFrame({"t": [text]}).select(chatml.parse(pl.col("t"))).item()
    turns = data._turns(text)
    assert (turns is None) == (parsed is None)
    if turns:
        assert turns == [f"{START}{message['role']}\n{message['content']}{END}" for message in parsed]


QUESTIONS = [("system", "Be brief."), ("user", "one " * 30), ("assistant", "two " * 30), ("user", "three"), ("assistant", "four"),
             ("user", "five")]  # fmt: skip


@pytest.mark.parametrize("layout", ["text", "messages"])
@pytest.mark.parametrize(("kept", "dropped"), [(QUESTIONS, []), ([QUESTIONS[0], *QUESTIONS[3:]], [0]),
                                               ([QUESTIONS[0], QUESTIONS[5]], [0]), ([QUESTIONS[5]], [0])])  # fmt: skip
def test_a_long_prompt_gives_way_by_its_oldest_questions_and_last_by_its_system_turn(smol, kept, dropped, layout):
    whole = texts_of([pair(kept, "yes " * 5, "no")])[0]
    limit = len(ids(smol, whole["prompt"] + whole["chosen"]))
    found = tokenized(smol, [pair(QUESTIONS, "yes " * 5, "no")], layout=layout, max_length=limit)
    assert found.shortened == len(dropped)
    (row,) = found.table
    assert text_of(smol, row["prompt_ids"] + row["chosen_ids"]) == whole["prompt"] + whole["chosen"]
    assert row["prompt_ids"] + row["rejected_ids"] == ids(smol, whole["prompt"] + whole["rejected"])


def test_the_last_question_and_the_answers_are_never_cut(smol):
    fits = texts_of([pair(QUESTIONS[-1:], "yes", "no " * 9)])[0]
    limit = len(ids(smol, fits["prompt"] + fits["rejected"]))
    found = tokenized(smol, [pair(QUESTIONS, "yes", "no " * 9)], max_length=limit)
    assert (len(found.table), found.left_out) == (1, {})
    found = tokenized(smol, [pair(QUESTIONS, "yes", "no " * 9), pair("Short?", "Yes", "No")], max_length=limit - 1)
    assert (len(found.table), found.left_out, found.shortened) == (1, {"tokens/too_long": 1}, 0)


@pytest.mark.parametrize("layout", ["text", "messages"])
def test_a_long_conversation_keeps_its_last_answer_and_question(smol, layout):
    turns = [*QUESTIONS, ("assistant", "six " * 9)]
    for kept in (turns, [turns[0], *turns[3:]], [turns[0], *turns[5:]], turns[5:]):
        text = frame([chat(*kept)], "sft").select(chatml.render(pl.col("messages"))).item()
        limit = len(ids(smol, text))
        found = tokenized(smol, [chat(*turns)], "sft", layout, limit)
        assert text_of(smol, found.table[0]["input_ids"]) == text
        assert found.shortened == (kept != turns)
        answers = "".join(content + END for role, content in kept if role == "assistant")
        assert text_of(smol, [token for token in found.table[0]["labels"] if token != -100]) == answers
    assert tokenized(smol, [chat(*turns)], "sft", layout, limit - 1).left_out == {"tokens/too_long": 1}


@MANY
@given(st.lists(st.tuples(prompts(), content, content), min_size=1, max_size=3), st.integers(8, 60))
def test_no_row_is_longer_than_asked_for_and_no_answer_is_another(smol, drawn, limit):
    rows = [pair(*parts) for parts in drawn]
    found = tokenized(smol, rows, max_length=limit)
    assert len(found.table) + sum(found.left_out.values()) == len(rows)
    whole = {row["id"]: row for row in tokenized(smol, rows).table}
    for row in found.table:
        assert len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= limit
        for side in ("chosen_ids", "rejected_ids"):
            assert row[side] == whole[row["id"]][side]


def test_answers_without_exactly_one_end_are_left_out(smol):
    broken = [
        pair("Two?", [], "One."),  # no answer at all
        pair("Two?", "One.", f"One.{END}"),
        pair("Two?", f"{END}One.", "One."),
        pair("Two?", [("assistant", "One."), ("user", "Sure?"), ("assistant", "Yes.")], "One."),
    ]
    found = tokenized(smol, [*broken, pair("Two?", "Yes.", "No.")])
    assert (len(found.table), found.left_out) == (1, {"tokens/no_eos": 4})


def test_special_tokens_in_a_prompt_do_not_move_its_boundary(smol):
    (row,) = tokenized(smol, [pair(f"What is {START}assistant\nfor?", "A mark.", "No.")]).table
    assert text_of(smol, row["chosen_ids"]) == f"A mark.{END}"
    (row,) = tokenized(smol, [pair("What is it?", f"{START}assistant\n is a mark.", "No.")]).table
    assert text_of(smol, row["rejected_ids"]) == f"No.{END}"


def test_a_newline_at_the_start_of_one_answer_is_the_same_boundary_for_both(smol):
    (row,) = tokenized(smol, [pair("Two?", "\n  yes", "no")]).table
    assert text_of(smol, row["prompt_ids"]).endswith(f"{START}assistant")
    assert text_of(smol, row["chosen_ids"]) == f"\n\n  yes{END}"
    assert text_of(smol, row["rejected_ids"]) == f"\nno{END}"


def test_a_pair_whose_prompt_has_two_tokenisations_is_left_out(smol, tmp_path):
    """A normaliser that reads the whole text: with "!" at its end, every "Two" is another word."""
    backend = Tokenizer.from_str(smol.tokenizer.backend_tokenizer.to_str())
    odd = dataclasses.replace(
        smol,
        tokenizer=SimpleNamespace(
            backend_tokenizer=_Odd(backend), added_tokens_encoder=smol.tokenizer.added_tokens_encoder
        ),
    )
    found = tokenized(odd, [pair("Two?", "Yes!", "No."), pair("Two?", "Yes.", "No.")])
    assert (len(found.table), found.left_out) == (1, {"tokens/boundary": 1})


class _Odd:
    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend

    def encode_batch_fast(self, texts, **options):
        return self._backend.encode_batch_fast([t.replace("Two", "Three") if "!" in t else t for t in texts], **options)

    def __getattr__(self, name):
        return getattr(self._backend, name)


def test_conversations_without_an_answer_or_with_special_tokens_inside_are_left_out(smol):
    rows = [
        chat(("user", "Two?"), ("assistant", "Yes."), ("user", "Sure?")),
        chat(("user", "Two?")),
        chat(("user", f"Two?{END}"), ("assistant", "Yes.")),
        chat(("user", "Two?"), ("assistant", f"Yes{START}.")),
        chat(("user", "Two?"), ("assistant", "Yes.")),
    ]
    found = tokenized(smol, rows, "sft")
    assert (len(found.table), found.left_out) == (1, {"tokens/no_answer": 2, "tokens/not_chatml": 2})


PAIRS = [pair(f"What is {n}?", f"It is {n}.", "No idea.") for n in range(1300)]


def test_a_second_call_opens_the_file_and_tokenises_nothing(smol, tmp_path, monkeypatch):
    mixture = mixture_of(tmp_path / "store" / "mix" / "build", [*PAIRS, pair("Two?", f"{END}", "One.")])
    seen = []
    first = tokenize(mixture, "preference", "train", smol, max_length=64, progress=lambda *at: seen.append(at))
    assert seen == [(512, 1301), (1024, 1301), (1301, 1301)]
    assert first.path.parent == tmp_path / "store" / "mix" / ".tokens"
    assert first.path.name == f"{mixture.digest[:12]}-{first.key[:12]}.arrow"
    assert sorted(path.suffix for path in first.path.parent.iterdir() if path.name != ".lock") == [".arrow"]
    monkeypatch.setattr(data, "_tokenized", None)
    again = tokenize(mixture, "preference", "train", smol, max_length=64)
    assert again.table.to_list() == first.table.to_list()
    assert dataclasses.replace(again, table=first.table) == first
    assert (again.left_out, again.table._fingerprint) == ({"tokens/no_eos": 1}, first.table._fingerprint)
    assert again.table.features == datasets.Features(
        {"id": datasets.Value("string")}
        | {name: datasets.List(datasets.Value("int32")) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    )


def test_the_table_is_mapped_from_its_file_and_travels_to_other_processes_by_its_path(smol, tmp_path):
    found = rows_of(mixture_of(tmp_path / "mix", PAIRS), "preference", smol)
    packed = pickle.dumps(found.table)
    assert len(packed) < 20_000 < found.path.stat().st_size
    assert pickle.loads(packed)[1299] == found.table[1299]
    assert found.table.cache_files == [{"filename": str(found.path)}]


def test_the_key_is_made_of_all_that_the_ids_depend_on_and_of_nothing_else(smol, tmp_path):
    mixture = mixture_of(tmp_path / "one" / "mix", PAIRS[:3])
    key = rows_of(mixture, "preference", smol).key
    moved = mixture_of(tmp_path / "two" / "mix", PAIRS[:3])
    assert rows_of(moved, "preference", smol).key == key
    others = [
        rows_of(mixture, "preference", smol, 99),
        rows_of(mixture, "preference", dataclasses.replace(smol, sha256="0" * 64)),
        rows_of(mixture_of(tmp_path / "three", PAIRS[:4]), "preference", smol),
        rows_of(mixture_of(tmp_path / "four", PAIRS[:3], layout="messages"), "preference", smol),
    ]
    assert len({key, *(other.key for other in others)}) == 5
    assert len({other.path for other in others}) == 4


def damages(path: Path, change) -> None:
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(change(whole))


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: b"",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-400],
        lambda whole: b"ARROW1" + whole,
        lambda whole: whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :],
    ],
    ids=["empty", "half", "end", "front", "one bit"],
)
def test_a_damaged_file_is_made_again(smol, tmp_path, change):
    mixture = mixture_of(tmp_path / "mix", PAIRS)
    first = rows_of(mixture, "preference", smol)
    expected, whole = first.table.to_list(), first.path.read_bytes()
    damages(first.path, change)
    again = rows_of(mixture, "preference", smol)
    assert again.table.to_list() == expected
    assert again.path.read_bytes() == whole


def test_every_bit_of_a_file_is_looked_at_before_it_is_used(smol, tmp_path):
    mixture = mixture_of(tmp_path / "mix", PAIRS[:2])
    first = rows_of(mixture, "preference", smol)
    expected, whole = first.table.to_list(), first.path.read_bytes()
    for place in range(0, len(whole), 7):
        damages(first.path, lambda whole, place=place: whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = data._opened(first.path, first.key)
        assert found is None or (found.table.to_list(), found) == (
            expected,
            dataclasses.replace(first, table=found.table),
        )
        first.path.unlink()
        first.path.write_bytes(whole)


def test_of_many_who_ask_at_once_one_tokenises(smol, tmp_path, monkeypatch):
    mixture = mixture_of(tmp_path / "mix", PAIRS)
    tokenized_, asked = data._tokenized, []
    monkeypatch.setattr(data, "_tokenized", lambda *a: asked.append(a) or tokenized_(*a))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: rows_of(mixture, "preference", smol), range(4)))
    assert len(asked) == 1
    assert len({(one.path, len(one.table)) for one in found}) == 1


def test_what_a_killed_process_left_is_not_taken_for_a_file(smol, tmp_path):
    mixture = mixture_of(tmp_path / "mix", PAIRS[:2])
    first = rows_of(mixture, "preference", smol)
    left = first.path.with_suffix(".part")
    first.path.rename(left)
    again = rows_of(mixture, "preference", smol)
    assert again.table.to_list() == first.table.to_list()
    assert not left.exists()


def test_a_store_that_cannot_be_written_needs_another_folder(smol, tmp_path):
    mixture = mixture_of(tmp_path / "mix", PAIRS[:2])
    (tmp_path / ".tokens").write_text("a file where the folder should be")
    with pytest.raises(TrainError, match=r"cannot be kept in .*\.tokens \(.*Copy the mixture to a folder"):
        rows_of(mixture, "preference", smol)
    found = tokenize(mixture, "preference", "train", smol, max_length=64, fallback=tmp_path / "runs" / "tokens")
    assert found.path.parent == tmp_path / "runs" / "tokens"
    assert len(found.table) == 2


def test_no_rows_make_an_empty_table(smol, tmp_path):
    found = tokenized(smol, [pair("Two?", END, "One.")])
    assert (len(found.table), found.tokens, found.left_out) == (0, 0, {"tokens/no_eos": 1})
    assert found.table.column_names == ["id", "prompt_ids", "chosen_ids", "rejected_ids"]


def test_a_split_that_is_not_there_is_named(smol, tmp_path):
    mixture = mixture_of(tmp_path / "mix", PAIRS[:2])
    with pytest.raises(MixtureError, match="preference has no split test"):
        tokenize(mixture, "preference", "test", smol, max_length=64)
    with pytest.raises(MixtureError, match="has no sft rows"):
        tokenize(mixture, "sft", "train", smol, max_length=64)


def test_settings_that_transformers_left_behind_do_not_cut_the_ids(smol, tmp_path):
    smol.tokenizer(["Hello there, how are you?"], truncation=True, max_length=2, padding="max_length")
    (row,) = rows_of(mixture_of(tmp_path / "mix", PAIRS[:1]), "preference", smol).table
    assert text_of(smol, row["chosen_ids"]) == f"It is 0.{END}"


def test_the_store_does_not_take_the_tokens_for_a_version(smol, versions, tmp_path):
    store = Store(shutil.copytree(versions, tmp_path / "store"))
    before = (store.names(), {name: store.versions(name) for name in store.names()})
    mixture = store.find("quickstart", "v1")
    found = tokenize(mixture, "preference", "train", smol, max_length=512)
    assert found.path.is_file()
    assert (store.names(), {name: store.versions(name) for name in store.names()}) == before
    mixture.verify()
    with store.staging("quickstart"):
        assert found.path.is_file()
    store.remove(store.find("quickstart", "v2"))
    assert found.path.is_file()
    assert list(store.versions("quickstart")) == ["v1", "v3"]


REAL = {
    "intel": "orca_dpo_pairs/real_intel_rows.parquet",
    "ultrafeedback": "ultrafeedback_binarized/real_ultrafeedback_rows.parquet",
    "openhermes": "openhermes/converted_hermes_sources.parquet",
    "sharegpt": "openhermes/sharegpt/*.json",
}


@pytest.fixture(scope="module")
def real(real_data, tmp_path_factory) -> dict[str, Mixture]:
    folder = tmp_path_factory.mktemp("real")
    for layout in ("text", "messages"):
        lines = [f'name = "{layout}"'] + [
            f'[sources.{name}]\npath = "{real_data / path}"' for name, path in REAL.items()
        ]
        lines[3] += "\ntake = 300"
        (folder / f"{layout}.toml").write_text("\n".join([*lines, f'[format]\nlayout = "{layout}"']), encoding="utf-8")
    return {layout: prefmix.build(folder / f"{layout}.toml", store=folder / "store") for layout in ("text", "messages")}


def test_real_pairs_have_the_ids_that_stock_trl_gives_them(real, smol):
    found = {
        layout: tokenize(mixture, "preference", "train", smol, max_length=8192) for layout, mixture in real.items()
    }
    ours = found["text"].table.to_list()
    assert len(ours) > 500
    assert found["text"].left_out == found["messages"].left_out == {}
    by_id = {row["id"]: row for row in found["messages"].table}
    assert [by_id[row["id"]] for row in ours] == ours
    read = {row["id"]: row for row in real["text"].scan("preference", "train").collect().to_dicts()}
    stock = trl(
        smol, [{name: read[row["id"]][name] for name in ("prompt", "chosen", "rejected")} for row in ours[:200]]
    )
    assert stock == [{name: ids for name, ids in row.items() if name != "id"} for row in ours[:200]]
    read = {row["id"]: row for row in real["messages"].scan("preference", "train").collect().to_dicts()}
    stock = trl(
        smol, [{name: read[row["id"]][name] for name in ("prompt", "chosen", "rejected")} for row in ours[:200]]
    )
    assert stock == [{name: ids for name, ids in row.items() if name != "id"} for row in ours[:200]]


def test_real_conversations_have_the_labels_of_the_template(real, smol):
    found = {layout: tokenize(mixture, "sft", "train", smol, max_length=8192) for layout, mixture in real.items()}
    by_id = {row["id"]: row for row in found["messages"].table}
    assert {row["id"]: row for row in found["text"].table} == by_id
    read = {row["id"]: row["messages"] for row in real["messages"].scan("sft", "train").collect().to_dicts()}
    for name in list(by_id)[:200]:
        marked = smol.tokenizer.apply_chat_template(read[name], return_dict=True, return_assistant_tokens_mask=True)
        labels = [t if m else -100 for t, m in zip(marked["input_ids"], marked["assistant_masks"], strict=True)]
        assert (by_id[name]["input_ids"], by_id[name]["labels"]) == (marked["input_ids"], labels)


def test_real_rows_that_are_too_long_are_shortened_or_counted(real, smol):
    for subset in ("preference", "sft"):
        found = tokenize(real["text"], subset, "train", smol, max_length=256)
        rows = real["text"].manifest["subsets"][subset]["train"]["rows"]
        assert len(found.table) + sum(found.left_out.values()) == rows
        assert set(found.left_out) == {"tokens/too_long"}
        assert found.shortened > 0
