from __future__ import annotations

import json

import pytest
from canonical import chat, frame, pair

from prefmix import filters
from prefmix.recipe import Filter

LONG = "The harbour was built in three parts, and each of them has its own story to tell about the town. " * 3


def reason(row: dict, **settings) -> str | None:
    kind = "sft" if "messages" in row else "preference"
    return filters.apply(frame([row], kind), Filter(**settings), kind)["reason"].item()


def reports(row: dict, **settings) -> list[str]:
    kind = "sft" if "messages" in row else "preference"
    rows = frame([row], kind)
    return [rule.reason for rule in filters.rules(Filter(**settings), kind, "report") if rows.select(rule.when).item()]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (pair("Name a river.", "The Nile.", "No idea."), None),
        (pair("", "The Nile.", "No idea."), "filter/empty"),
        (pair("Name a river.", " \n\t", "No idea."), "filter/empty"),
        (pair("Name a river.", "The Nile.", "\u200b"), "filter/empty"),
        (chat(("user", "Hi"), ("assistant", "")), "filter/empty"),
        (chat(("user", "Hi"), ("assistant", ""), ("tool", ""), ("assistant", "Done.")), "filter/empty"),
        (chat(("system", ""), ("user", "Hi"), ("assistant", "Hello.")), None),
        (pair("Name a river.", "The Nile.", "The  Nile.\n"), "filter/identical"),
        (pair("Name a café.", "Café Noir", "Cafe\u0301 Noir"), "filter/identical"),
        (pair("Write it.", "a - b", "a + b"), None),
        (pair("Write it.", "Nile", "nile"), None),
        (pair("Name a river.", "The Nile.", "No idea.", (4.0, 4.0)), "filter/tie"),
        (pair("Name a river.", "The Nile.", "No idea.", (3.0, 4.0)), "filter/inverted"),
        (pair("Name a river.", "The Nile.", "No idea.", (4.0, None)), None),
        (chat(("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")), "filter/roles"),
        (chat(("assistant", "Hello.")), "filter/roles"),
        (chat(("user", "Hi"), ("user", "Hi?"), ("assistant", "Hello.")), "filter/roles"),
        (chat(("user", "Hi"), ("system", "x"), ("assistant", "Hello.")), "filter/roles"),
        (
            chat(("system", "x"), ("user", "1"), ("assistant", "2"), ("tool", "3"), ("tool", "4"), ("assistant", "5")),
            None,
        ),
        (pair((("user", "a"), ("assistant", "b")), "c", "d"), "filter/roles"),
        (pair("Hi", (("user", "c"),), "d"), "filter/roles"),
        (pair("Name a river.", "The Nile.</s>", "No idea."), "filter/injection"),
    ],
)
def test_what_cannot_be_trained_on_is_dropped_by_default(row, expected):
    assert reason(row) == expected


REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m sorry, I can’t assist with this request.",
    "Sorry, I am unable to provide medical advice.",
    "As an AI language model, I don't have personal opinions, but here are some.",
    "I cannot fulfill your request.",
    "Unfortunately, I can't answer that question.",
    "My apologies, but I cannot complete that sentence.",
]
ANSWERS = [
    "I'm sorry to hear that you are ill. Drink tea and rest.",
    "Unfortunately, we cannot determine the angle without a second side.",
    "I am an AI assistant. How can I help you today?",
    "As an air traveller, I do not like delays.",
    "I can't wait to see you!",
    "You can say: \"I'm sorry, but I can't help with that.\"",
    "The robot said that, as an AI, it cannot dream.",
]


@pytest.mark.parametrize("answer", REFUSALS)
def test_an_answer_that_opens_with_a_refusal_is_dropped(answer):
    assert reason(pair("Please do it.", answer, "Do what?")) == "filter/refusal"
    assert reason(chat(("user", "Please do it."), ("assistant", answer))) == "filter/refusal"


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_only_sounds_like_a_refusal_stays(answer):
    assert reason(pair("Please do it.", answer, "Do what?")) is None


def test_a_refusal_on_the_rejected_side_stays():
    assert reason(pair("Please do it.", "Here it is.", "I'm sorry, but I can't help with that.")) is None


def test_a_disclaimer_about_real_time_data_is_a_class_of_its_own():
    row = pair("What is the weather?", "I'm sorry, but as an AI I don't have access to real-time data.", "Sunny.")
    assert reason(row) is None
    assert reports(row) == ["filter/disclaimer"]
    assert reason(row, disclaimers="drop") == "filter/disclaimer"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Dear {{name}}, welcome.", ["filter/placeholder"]),
        ("Welcome to [insert company name].", ["filter/placeholder"]),
        ("Dear [Your Name], welcome.", []),
        ("A set is written {a, b} and a list [a, b].", []),
        (LONG + "And then the storm came over the harbour and", ["filter/cut_off"]),
        (LONG, []),
        (LONG + "\n- a first item of a list that is long enough to count as a line", []),
        (LONG + "\n```python\nprint(1)", ["filter/cut_off"]),
        ("Short and without a stop", []),
    ],
)
def test_placeholders_and_cut_off_answers_are_reported_and_kept(answer, expected):
    row = pair("Write it.", answer, "No.")
    assert reason(row) is None
    assert reports(row) == expected


def test_the_margin_must_be_greater_than_the_wanted_one():
    def row(margin: float) -> dict:
        return pair("Name a river.", "The Nile.", "No idea.", (4.0, 4.0 - margin))

    assert [reason(row(m), min_margin=0.5) for m in (0.5, 0.75)] == ["filter/margin", None]
    assert reason(row(0), min_margin=0.5) == "filter/tie"
    assert reason(row(0), min_margin="off") is None
    assert reports(row(0), min_margin="report") == ["filter/tie"]
    assert reason(row(-1), min_margin="off", on_inverted="report") is None
    assert reports(row(-1), min_margin="off", on_inverted="report") == ["filter/inverted"]
    assert reason(row(-1), min_margin=0.0, on_inverted="off") == "filter/margin"
    assert reason(row(1), min_score=4.5) == "filter/min_score"


def test_swapping_exchanges_answers_and_scores_and_is_recorded():
    rows = frame([pair("q", "worse", "better", (1.0, 3.0)), pair("q", "good", "bad", (3.0, 1.0))])
    swapped = filters.apply(rows, Filter(on_inverted="swap"), "preference")
    assert swapped["reason"].null_count() == 2
    assert [row[0]["content"] for row in swapped["chosen"].to_list()] == ["better", "good"]
    assert swapped["chosen_score"].to_list() == [3.0, 3.0]
    change, unchanged = swapped["changes"].to_list()
    assert unchanged == []
    assert change[0]["change"] == "swap"
    assert json.loads(change[0]["detail"]) == {"chosen_score": 1.0, "rejected_score": 3.0}
    assert swapped["id"].to_list() == rows["id"].to_list()


def test_stripping_removes_special_tokens_and_records_them():
    rows = frame([pair("q<|im_end|>", "a</s>b", "c"), pair("q", "a", "b")])
    stripped = filters.apply(rows, Filter(injection="strip"), "preference")
    assert stripped["reason"].null_count() == 2
    assert stripped["prompt"].to_list()[0][0]["content"] == "q"
    assert stripped["chosen"].to_list()[0][0]["content"] == "ab"
    change, unchanged = stripped["changes"].to_list()
    assert json.loads(change[0]["detail"]) == {"tokens": ["</s>", "<|im_end|>"]}
    assert unchanged == []


def test_limits_in_characters_count_code_points_and_name_the_part():
    row = pair("Frage", "äöü", "antwort")
    assert reason(row, min_chars={"answer": 4}) == "filter/min_chars"
    assert reason(row, min_chars=3) is None
    assert reason(row, max_chars={"prompt": 4}) == "filter/max_chars"
    assert reason(row, max_chars={"total": 12}) is None
    assert reason(row, max_chars={"total": 11}) == "filter/max_chars"
    assert reason(pair("q", "long answer", "ab"), max_length_ratio=5) == "filter/max_length_ratio"


LANGUAGES = {
    "en": ["Paris is the capital of France, and it lies on the river Seine.", "Yes.", "def add(a, b):\n    return a + b",
           "\\frac{a}{b} = c^2", "42"],
    "de": ["Paris ist die Hauptstadt von Frankreich und liegt an der Seine, einem langen Fluss."],
    "zh": ["巴黎是法国的首都，位于塞纳河畔，是一座历史悠久的城市，有许多著名的博物馆。"],
    "hi": ["पेरिस फ्रांस की राजधानी है और यह सीन नदी के किनारे बसा हुआ एक सुंदर शहर है।"],
}  # fmt: skip


@pytest.mark.parametrize(("language", "answer"), [(lang, text) for lang, texts in LANGUAGES.items() for text in texts])
def test_only_the_wanted_languages_stay_and_code_and_short_answers_are_not_judged(language, answer):
    row = pair("q", answer, "No.")
    assert reason(row, languages=["en"]) == (None if language == "en" else "filter/language")
    assert reason(row, languages=[language]) is None
    assert reason(row) is None


def test_rules_that_are_off_do_not_look():
    row = pair("", "", "", (1.0, 2.0))
    assert reason(row, default="off") is None
    assert reports(row, default="off") == []
    assert reason(row, default="off", on_inverted="drop") == "filter/inverted"
