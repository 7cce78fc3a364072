from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from canonical import chat, frame, pair
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from prefmix import chatml, filters, pieces, tokens
from prefmix.errors import SourceError
from prefmix.recipe import Filter
from prefmix.schema import CANONICAL

CORPUS = [
    "user\nHello there, how are you today?",
    "assistant\nI am well, thank you.\n\n- one\n- two",
    "system\nBe brief. " * 3,
]
CHATML = [
    AddedToken("<|im_start|>", special=True, normalized=False),
    AddedToken("<|im_end|>", special=True, normalized=False),
]


def byte_level() -> Tokenizer:
    """Like the tokenizers of Llama 3 and SmolLM2: newlines merge with what follows them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """Like the tokenizer of Mistral 7B: a blank is put before every segment, unknown characters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    return tokenizer


def odd() -> Tokenizer:
    """A special token that swallows the blanks after it: the segments of a text do not add up."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens(
        [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True, rstrip=True)]
    )
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path) -> tokens.LoadedTokenizer:
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokens.load(str(folder), "main", Path("/"))


@pytest.fixture(scope="module", params=[byte_level, metaspace, odd])
def loaded(request, tmp_path_factory) -> tokens.LoadedTokenizer:
    return saved(request.param(), tmp_path_factory.mktemp("tokenizer"))


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["\n\nHello", " there ", "", "\n", "well\n"]
)
turn = st.tuples(st.sampled_from(["user", "assistant", "tool"]), text)


def length(loaded: tokens.LoadedTokenizer, rendered: str) -> int:
    return len(loaded.tokenizer.encode(rendered, add_special_tokens=False))


@settings(max_examples=40)
@given(rows=st.lists(st.tuples(st.lists(turn, min_size=1, max_size=3), text, text), min_size=1, max_size=4))
def test_counts_are_those_of_the_whole_rendered_text(loaded, rows):
    read = frame([pair(prompt, chosen, rejected) for prompt, chosen, rejected in rows])
    counted = tokens.count(read, "preference", loaded)
    shown = read.select(
        p=chatml.render_prompt(pl.col("prompt")),
        c=chatml.render_answer(pl.col("chosen")),
        r=chatml.render_answer(pl.col("rejected")),
    )
    for (p, c, r), got in zip(
        shown.rows(), counted.select("prompt_tokens", "chosen_tokens", "rejected_tokens").rows(), strict=True
    ):
        if chatml.SPECIAL_TOKENS and any(token in p + c + r for token in ("<unk>",)):
            continue
        assert got == (
            length(loaded, p),
            length(loaded, p + c) - length(loaded, p),
            length(loaded, p + r) - length(loaded, p),
        )


def test_a_conversation_is_counted_as_a_whole_and_up_to_its_last_answer(loaded):
    read = frame(
        [
            chat(
                ("system", "Be brief."),
                ("user", "Hello"),
                ("assistant", "I am well."),
                ("user", "Bye"),
                ("assistant", "Bye."),
            )
        ],
        "sft",
    )
    counted = tokens.count(read, "sft", loaded)
    whole = read.select(chatml.render(pl.col("messages"))).item()
    assert counted["tokens"].item() == length(loaded, whole)
    before = whole.rpartition("<|im_start|>assistant\n")[0] + "<|im_start|>assistant\n"
    assert counted["prompt_tokens"].item() == length(loaded, before)


def test_tokens_that_the_tokenizer_does_not_have_count_as_one_and_are_named(tmp_path):
    loaded = saved(byte_level(), tmp_path)
    assert loaded.added == ("<|im_start|>", "<|im_end|>")
    assert length(loaded, "<|im_end|>") == 1
    known = byte_level()
    known.add_special_tokens(CHATML)
    assert saved(known, tmp_path).added == ()


def test_no_rows_have_columns_of_counts_all_the_same(loaded):
    empty = pl.DataFrame(schema=CANONICAL["preference"])
    assert tokens.count(empty, "preference", loaded).columns[-3:] == [
        "prompt_tokens",
        "chosen_tokens",
        "rejected_tokens",
    ]


def test_limits_in_tokens_are_on_the_prompt_the_longer_answer_and_both(tmp_path):
    loaded = saved(byte_level(), tmp_path)
    rows = tokens.count(frame([pair("Hello there", "I am well, thank you.", "Hm.")]), "preference", loaded)
    prompt, chosen = rows["prompt_tokens"].item(), rows["chosen_tokens"].item()

    def dropped(**limits: int) -> list[str]:
        settings_ = Filter(**limits)
        return [rule.reason for rule in filters.in_tokens(settings_, "preference") if rows.select(rule.when).item()]

    assert dropped(max_prompt_tokens=prompt, max_answer_tokens=chosen, max_tokens=prompt + chosen) == []
    assert dropped(max_prompt_tokens=prompt - 1, max_answer_tokens=chosen - 1, max_tokens=prompt + chosen - 1) == [
        "filter/max_prompt_tokens", "filter/max_answer_tokens", "filter/max_tokens",
    ]  # fmt: skip


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_a_clear_error(tmp_path):
    with pytest.raises(SourceError, match=r"has no tokenizer.json"):
        tokens.load(str(tmp_path), "main", Path("/"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="not a tokenizer that can be read"):
        tokens.load(str(tmp_path), "main", Path("/"))


@pytest.fixture(scope="module", params=[byte_level, metaspace])
def in_pieces(request) -> tuple[Tokenizer, pieces.PieceCounter]:
    tokenizer = request.param()
    tokenizer.add_special_tokens(CHATML)
    counter = pieces.piece_counter(tokenizer)
    assert counter is not None
    return tokenizer, counter


anything = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    | st.text("ab .,\n\t▁é\u00a0\u0301中1", max_size=30)
    | st.sampled_from(["well<|im_end|>\n", "<|im_start|>", "Hello there, how are you today?", " \n \n  x"]),
    max_size=6,
)


@given(anything)
def test_pieces_give_the_counts_and_the_ids_of_the_tokenizer(in_pieces, texts):
    tokenizer, counter = in_pieces
    series = pl.Series(texts, dtype=pl.String)
    assert counter(series).tolist() == [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    assert counter.agrees(series)


def test_a_piece_is_tokenised_once(in_pieces, monkeypatch):
    _, counter = in_pieces
    tokenise, asked = counter._tokenise, []
    monkeypatch.setattr(counter, "_tokenise", lambda texts: asked.extend(texts) or tokenise(texts))
    texts = pl.Series(["walk walked walking walk", "walk walk"])
    assert (counter(texts) == counter(texts)).all()
    assert len(asked) == len(set(asked)) > 0


def test_threads_share_a_counter(in_pieces):
    tokenizer, counter = in_pieces
    texts = [
        pl.Series([f"word{n} {n} and {n * n} more" for n in range(start, start + 50)]) for start in range(0, 800, 25)
    ]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(counter, texts))
    for part, counts in zip(texts, found, strict=True):
        assert counts.tolist() == [len(tokenizer.encode(text, add_special_tokens=False)) for text in part]


def no_pieces() -> dict[str, Tokenizer]:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    random = metaspace()
    random.model = models.BPE(dropout=0.1)
    lower = byte_level()
    lower.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True)])
    fused = metaspace()
    fused.model = models.BPE({"<unk>": 0, "▁": 1, "a": 2}, [], unk_token="<unk>", fuse_unk=True)
    split = metaspace()
    split.pre_tokenizer = pre_tokenizers.Digits()
    return {"wordpiece": words, "dropout": random, "prefix": lower, "fused": fused, "digits": split}


@pytest.mark.parametrize("name", no_pieces())
def test_other_tokenizers_are_not_counted_by_pieces(name):
    assert pieces.piece_counter(no_pieces()[name]) is None


def test_pieces_that_disagree_on_the_rows_are_not_used(tmp_path, monkeypatch):
    loaded = saved(metaspace(), tmp_path)
    assert loaded.pieces is not None
    rows = frame([pair("Hello there", "I am well, thank you.", "Hm.")])
    right = tokens.count(rows, "preference", loaded)
    monkeypatch.setattr(pieces.PieceCounter, "__call__", lambda self, texts: np.full(len(texts), 7))
    monkeypatch.setattr(loaded.pieces, "agrees", lambda texts: False)
    assert tokens.count(rows, "preference", loaded).equals(right)
