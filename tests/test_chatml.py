from __future__ import annotations

import polars as pl
import pytest
from canonical import chat, frame
from hypothesis import given
from hypothesis import strategies as st

from prefmix import chatml, filters
from prefmix.recipe import Filter
from prefmix.schema import MESSAGES

TOKENS = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<s>", "</s>", "[INST]", "[/INST]",
    "<<SYS>>", "<</SYS>>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<|assistant|>", "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>", "[TOOL_CALLS]",
]  # fmt: skip
text = st.text(st.characters(exclude_categories=["Cs"]))
# Texts that are nearly tokens, so that what is left after a removal can be one.
near_tokens = st.lists(
    st.sampled_from([*TOKENS, "<|im_", "end|>", "<", "s>", "|>", "<|", "im_start", "a", "\n", " "]), max_size=8
).map("".join)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": text | near_tokens}
    ),
    max_size=5,
)


def series(values: list) -> pl.DataFrame:
    return pl.DataFrame({"messages": values}, schema={"messages": MESSAGES})


def is_clean(conversation: list[dict]) -> bool:
    return not series([conversation]).select(chatml.has_special_tokens("messages")).item()


def test_a_conversation_renders_as_chatml_with_one_end_per_turn():
    rows = series([[{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]])
    assert rows.select(chatml.render(pl.col("messages"))).item() == (
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
    )


@given(
    messages, st.lists(st.fixed_dictionaries({"role": st.just("assistant"), "content": text}), min_size=1, max_size=2)
)
def test_rendering_and_parsing_are_inverse_on_every_clean_row(prompt, answer):
    if not is_clean(prompt) or not is_clean(answer):
        return
    rows = pl.DataFrame(
        {"p": [prompt], "a": [answer], "all": [prompt + answer]}, schema={"p": MESSAGES, "a": MESSAGES, "all": MESSAGES}
    )
    shown = rows.select(
        p=chatml.render_prompt(pl.col("p")), a=chatml.render_answer(pl.col("a")), all=chatml.render(pl.col("all"))
    )
    assert shown["p"].item().endswith("<|im_start|>assistant\n")
    assert shown["a"].item().endswith("<|im_end|>")
    assert shown["p"].item() + shown["a"].item() == shown["all"].item()
    assert shown["all"].item().count("<|im_end|>") == len(prompt) + len(answer)
    parsed = shown.select(
        p=chatml.parse_prompt(pl.col("p")), a=chatml.parse_answer(pl.col("a")), all=chatml.parse(pl.col("all"))
    )
    assert parsed.to_dicts() == rows.to_dicts()


@pytest.mark.parametrize("broken", ["hello", "<|im_start|>user\nhi", "<|im_start|>user\nhi<|im_end|>\n", "<|im_start|>user\nhi<|im_end|><|im_end|>",
                                    "x<|im_start|>user\nhi<|im_end|>"])  # fmt: skip
def test_text_that_is_not_exactly_chatml_parses_to_null(broken):
    assert pl.DataFrame({"t": [broken]}).select(chatml.parse(pl.col("t"))).item() is None


@pytest.mark.parametrize("token", TOKENS)
@given(before=text, after=text)
def test_a_special_token_anywhere_in_a_content_never_passes(token, before, after):
    rows = frame([chat(("user", "Hi"), ("assistant", before + token + after))], "sft")
    dropped = filters.apply(rows, Filter(), "sft")
    assert dropped["reason"].item() == "filter/injection"


@given(messages.filter(len))
def test_stripping_leaves_no_special_token_and_only_removes_characters(conversation):
    rows = series([conversation])
    stripped = chatml.strip_special_tokens(rows["messages"]).to_list()[0]
    assert is_clean(stripped)
    for before, after in zip(conversation, stripped, strict=True):
        assert after["role"] == before["role"]
        remaining = iter(before["content"])
        assert all(character in remaining for character in after["content"])
        if is_clean([before]):
            assert after == before


def test_system_messages_are_kept_dropped_or_filled_in():
    with_system, without = chat(("system", "Be brief."), ("user", "Hi")), chat(("user", "Hi"))
    rows = frame([with_system, without], "sft")

    def roles(system: str) -> list:
        shown = chatml.with_system(rows, "sft", system)["messages"].to_list()
        return [[m["content"] for m in row if m["role"] == "system"] for row in shown]

    assert roles("keep") == [["Be brief."], []]
    assert roles("drop") == [[], []]
    assert roles("Be kind.") == [["Be brief."], ["Be kind."]]
