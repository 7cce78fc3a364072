"""`prefmix chat`: answers and why they end, what is typed stays text, and the terminal stays the user's."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from served import quiet_environment, sentencepiece_tokenizer
from small_models import byte_tokenizer, micro_llama
from transformers import PreTrainedTokenizerFast

from prefmix.cli.chats import _Talk
from prefmix.cli.main import run
from prefmix.errors import ModelError
from prefmix.model.chat import Answer, Conversation, open_conversation
from prefmix.train.tokenizer import CHAT_TEMPLATE

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A micro Llama of bytes that talks nonsense."""
    folder = tmp_path_factory.mktemp("talkers")
    micro_llama(folder / "micro", tokenizer=byte_tokenizer(folder / "bytes"))
    (folder / "micro" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder / "micro"


@pytest.fixture(scope="module")
def tokenizer(model) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(model)


class Scripted:
    """A model that says what it is told to, and keeps the ids that it was asked with."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, *answers: str, ends: object = None) -> None:
        self.answers = [tokenizer.encode(answer, add_special_tokens=False) for answer in answers]
        self.vocabulary = len(tokenizer)
        self.generation_config = SimpleNamespace(eos_token_id=ends)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=4096))
        self.asked: list[list[int]] = []

    def __call__(self, input_ids, past_key_values, use_cache, logits_to_keep):
        if past_key_values is None:
            self.asked.append(input_ids[0].tolist())
            past_key_values = iter(self.answers.pop(0))
        logits = torch.zeros(1, 1, self.vocabulary)
        logits[0, 0, next(past_key_values)] = 1.0
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)


def said(chat: Conversation, prompt: str, **settings) -> tuple[list[str], Answer]:
    *pieces, answer = chat.answer(prompt, **settings)
    assert isinstance(answer, Answer)
    return [piece for piece in pieces if isinstance(piece, str)], answer


@pytest.mark.parametrize(
    ("script", "ends", "settings", "reason", "text", "tokens"),
    [
        ("Yes.<|im_end|>", None, {}, "stop", "Yes.", 5),
        ("Yes.<|endoftext|>", [258, 256], {}, "<|endoftext|>", "Yes.", 5),
        ("Yes, yes, yes", None, {"max_tokens": 4}, "length", "Yes,", 4),
        ("Yes, yes, yes", None, {"interrupted": lambda: True}, "interrupted", "Y", 1),
        ("<|im_start|>user<|im_end|>", None, {}, "stop", "<|im_start|>user", 6),
    ],
)
def test_an_answer_says_why_it_ended(tokenizer, script, ends, settings, reason, text, tokens):
    pieces, answer = said(Conversation(Scripted(tokenizer, script, ends=ends), tokenizer), "Well?", **settings)
    assert (answer.finish_reason, answer.answer, answer.tokens) == (reason, text, tokens)
    assert "".join(pieces) == text
    assert answer.as_json().keys() == {"prompt", "answer", "tokens", "finish_reason", "tokens_per_s"}


def test_an_answer_is_cut_where_the_model_sees_no_more_and_a_longer_conversation_is_an_error(tokenizer):
    chat = Conversation(Scripted(tokenizer, "Yes, yes, yes"), tokenizer)
    asked = len(chat.token_ids([{"role": "user", "content": "Well?"}]))
    chat.model.config.get_text_config = lambda: SimpleNamespace(max_position_embeddings=asked + 3)
    assert said(chat, "Well?")[1].finish_reason == "length"
    with pytest.raises(ModelError, match=r"has \d+ tokens, and the model sees \d+: start a new one"):
        said(chat, "And?")
    assert len(chat.turns) == 2


def test_greedy_answers_are_those_of_transformers(model):
    chat = open_conversation(str(model))
    pieces, answer = said(chat, "Count to ten.", max_tokens=40)
    ids = chat.token_ids([{"role": "user", "content": "Count to ten."}])
    given_ids = torch.tensor([ids])
    whole = chat.model.generate(
        input_ids=given_ids, attention_mask=torch.ones_like(given_ids), max_new_tokens=40, do_sample=False
    )
    assert answer.answer == chat.tokenizer.decode(whole[0, len(ids) :])
    assert "".join(pieces) == answer.answer
    assert answer.tokens == 40


def test_sampling_is_more_varied_than_the_likeliest_token(model):
    chat = open_conversation(str(model))

    def answers(temperature):
        found = set()
        for _ in range(3):
            chat.start()
            found.add(said(chat, "Go on.", max_tokens=12, temperature=temperature)[1].answer)
        return len(found)

    assert answers(0.0) == 1
    assert answers(1.0) == 3


def test_a_character_of_several_bytes_comes_whole(tokenizer):
    pieces, answer = said(Conversation(Scripted(tokenizer, "aé日🙂<|im_end|>"), tokenizer), "Well?")
    assert pieces == ["a", "é", "日", "🙂"]
    assert answer.answer == "aé日🙂"


def test_turns_are_remembered_until_a_new_conversation(tokenizer):
    model = Scripted(tokenizer, *["Fine.<|im_end|>"] * 3)
    chat = Conversation(model, tokenizer, system="Be brief.")
    said(chat, "How are you?")
    said(chat, "And now?")
    chat.start()
    said(chat, "Hello?")
    assert [tokenizer.decode(ids) for ids in model.asked] == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
        "Fine.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n",
    ]


_TYPED = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "end|>", "\n", " ", "user", "é"])
)


@given(typed=_TYPED)
def test_what_is_typed_never_becomes_a_control_token(tokenizer, typed):
    text = "".join(typed)
    chat = Conversation(Scripted(tokenizer), tokenizer)
    ids = chat.token_ids([{"role": "user", "content": text}])
    special = set(tokenizer.all_special_ids)
    assert [token for token in ids if token in special] == [
        token for token in chat.token_ids([{"role": "user", "content": "x"}]) if token in special
    ]
    assert tokenizer.decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@given(text=st.text(st.characters(exclude_categories=("Cs", "Co"))))
def test_other_text_has_the_ids_that_it_has_in_training(spm, text):
    turns = [{"role": "user", "content": text}]
    expected = spm.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert Conversation(Scripted(spm), spm).token_ids(turns) == expected


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return PreTrainedTokenizerFast.from_pretrained(sentencepiece_tokenizer(tmp_path_factory.mktemp("spm")))


def test_typed_tokens_split_a_sentencepiece_text_like_other_text(spm):
    chat = Conversation(Scripted(spm), spm)
    typed, plain = (
        chat.token_ids([{"role": "user", "content": f"Say {it} now."}]) for it in ("<|im_end|>", "< im_end >")
    )
    ends = spm.added_tokens_encoder["<|im_end|>"]
    assert typed.count(ends) == plain.count(ends) == 1
    assert typed[:4] == plain[:4]


def test_a_model_without_a_chat_template_is_told_what_to_do(tmp_path, capsys):
    folder = micro_llama(tmp_path / "mute", tokenizer=byte_tokenizer(tmp_path / "bytes"))
    assert run(["chat", str(folder)]) == 1
    assert "has no chat template" in (error := capsys.readouterr().err)
    assert "chat_template.jinja" in error


def typed(monkeypatch, *lines: str) -> None:
    text = "".join(f"{line}\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_each_line_of_stdin_is_a_turn_and_stdout_has_the_answers_alone(model, capsys, monkeypatch):
    typed(monkeypatch, "One", "", "/system Be brief.", "Two", "/quit", "Three")
    assert run(["chat", str(model), "--max-tokens", "5", "--temperature", "0"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("5 tokens, ") == shown.err.count("length (cut at 5 tokens)") == 2
    assert "a new conversation, with the system prompt: Be brief." in shown.err
    chat = open_conversation(str(model))
    one = said(chat, "One", max_tokens=5)[1].answer
    chat.start("Be brief.")
    two = said(chat, "Two", max_tokens=5)[1].answer
    from prefmix.cli.texts import plain

    assert shown.out == f"{plain(one)}\n{plain(two)}\n"


def test_json_has_a_line_for_each_answer(model, capsys, monkeypatch):
    typed(monkeypatch, "One", "Two")
    words = ["chat", str(model), "--against", str(model), "--max-tokens", "3", "--temperature", "0", "--json"]
    assert run(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["One", "One", "Two", "Two"]
    assert [line["finish_reason"] for line in lines] == ["length"] * 4
    assert lines[0]["answer"] == lines[1]["answer"]
    assert {line["model"] for line in lines} == {str(model)}
    assert all(line["tokens"] == 3 and line["tokens_per_s"] > 0 for line in lines)


def test_what_a_model_says_cannot_command_the_terminal(tokenizer, capsys):
    chat = Conversation(Scripted(tokenizer, "\x1b[2J[bold]x[/]\x07\r<|im_end|>"), tokenizer)
    _Talk(["it"], [chat], {"max_tokens": 40}, False).take("Well?")
    assert capsys.readouterr().out == "␛[2J[bold]x[/]␇␍\n"


class Terminal:
    """A program that believes it is in a terminal of 100 columns."""

    def __init__(self, *words: str) -> None:
        self.end, inner = pty.openpty()
        environment = quiet_environment(TERM="xterm", COLUMNS="100", LINES="30")
        command = [sys.executable, "-m", "prefmix", *words]
        self.process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=environment)
        os.close(inner)
        self.shown = ""

    def until(self, pattern: str) -> str:
        """What is shown up to the end of a pattern."""
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            assert select.select([self.end], [], [], 120)[0], self.shown
            self.shown += os.read(self.end, 65536).decode(errors="replace")
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def press_ctrl_c(self) -> None:
        time.sleep(0.2)
        self.process.send_signal(signal.SIGINT)


@pytest.fixture
def terminal(model):
    found = Terminal("chat", str(model), "--against", str(model), "--max-tokens", "1500", "--temperature", "0")
    yield found
    found.process.kill()
    found.process.wait()
    os.close(found.end)


def test_in_a_terminal_ctrl_c_stops_the_answer_and_twice_leaves(terminal, model):
    terminal.until(r"/help.*?> ")
    terminal.type("Tell me all.\n")
    columns = terminal.until(r"\x1b\[1A")  # drawn again
    assert re.search(rf"{re.escape(str(model))[-20:]}.*{re.escape(str(model))[:20]}", columns)
    terminal.press_ctrl_c()
    assert terminal.until(r"\d+ tokens, [\d.,]+ tokens/s, interrupted.*?interrupted.*?> ")
    terminal.type("/help\n")
    assert "/system TEXT" in terminal.until(r"twice: leave.*?> ")
    terminal.press_ctrl_c()
    terminal.until("Ctrl-C again leaves.*?> ")
    terminal.press_ctrl_c()
    assert terminal.process.wait(timeout=60) == 0


def test_in_a_terminal_ctrl_d_leaves(terminal):
    terminal.until(r"/help.*?> ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=60) == 0
