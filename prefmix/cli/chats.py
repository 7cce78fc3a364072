"""`prefmix chat`: a conversation in the terminal, with one model or with two side by side."""

from __future__ import annotations

import io
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prefmix.cli.extras import with_models
from prefmix.cli.progress import run_beside
from prefmix.cli.screen import err, out, say
from prefmix.errors import ModelError

if TYPE_CHECKING:
    from prefmix.model.chat import Answer, Conversation

_HELP = """/new          forget the conversation and start another
/system TEXT  start another, with this system prompt (without TEXT: with none)
/quit         leave, as Ctrl-D does
Ctrl-C        stop the answer; twice: leave"""
_REDRAW_S = 0.1


@click.command("chat")
@click.argument("model", metavar="MODEL|RUN", type=click.Path())
@click.option("--against", metavar="OTHER", help="Another model or run: both answer each prompt, side by side.")
@click.option("--system", metavar="TEXT", help="The system prompt.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="The bound of an answer."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.7,
    show_default=True,
    help="0 takes the likeliest token each time; more is more varied.",
)
@click.option("--base", metavar="DIR", help="The folder of an adapter's base, where it is not found by its name.")
@click.option("--json", "as_json", is_flag=True, help="Print each answer as a line of JSON.")
def chat_command(
    model: str,
    against: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    base: str | None,
    as_json: bool,
) -> None:
    """Talk to a model in the terminal, or to two on the same prompt.

    A run answers with its last stage, loaded as it was trained. Below each answer stands why it ended: stop is the token
    that ends a turn, length the bound. Commands: /new, /system TEXT, /quit, /help. Where stdin is no terminal, each of its
    lines is a turn. A special token that is typed, such as <|im_end|>, reaches the model as text.
    """
    names = [model, *([against] if against else [])]

    def load() -> list[Conversation]:
        from prefmix.model.chat import open_conversation

        adapted = [_is_adapted(Path(name)) for name in names]
        bases = [base if own or not any(adapted) else None for own in adapted]
        return [open_conversation(name, its, system) for name, its in zip(names, bases, strict=True)]

    chats = with_models("chat", "loading the model" if len(names) == 1 else "loading the models", load, not as_json)
    talk = _Talk(names, chats, {"max_tokens": max_tokens, "temperature": temperature}, as_json)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty() and sys.stdout.isatty() and not as_json:
        _in_a_terminal(talk)
    else:
        run_beside(lambda: any(not talk.take(line) for line in sys.stdin))


def _is_adapted(folder: Path) -> bool:
    """Whether a base belongs to it: an adapter or a run."""
    from prefmix.stages import stages_of

    return bool(stages_of(folder)) or (folder / "adapter_config.json").is_file()


@dataclass(frozen=True)
class _Talk:
    """The conversations by name, and how they are answered and shown."""

    names: Sequence[str]
    chats: Sequence[Conversation]
    settings: dict[str, Any]
    as_json: bool

    def take(self, line: str, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Answers a line, or does what it commands. False when it is to leave."""
        from prefmix.cli.texts import plain

        prompt = line.strip()
        command, _, text = prompt.partition(" ")
        if command == "/quit":
            return False
        if command == "/help":
            say((_HELP, "dim"), on=err())
        elif command in ("/new", "/system"):
            for chat in self.chats:
                turns = chat.turns[:1] if command == "/new" else [{"role": "system", "content": text.strip()}]
                chat.start(turns[0]["content"] if turns and turns[0]["role"] == "system" else None)
            said = f", with the system prompt: {plain(text.strip())}" if text.strip() and command == "/system" else ""
            say((f"a new conversation{said}", "dim"), on=err())
        elif prompt:
            self._answer(prompt, interrupted)
        return True

    def _answer(self, prompt: str, interrupted: Callable[[], bool]) -> None:
        if self.as_json:
            self._as_json(prompt)
        elif len(self.chats) > 1 and out().is_terminal:
            self._side_by_side(prompt, interrupted)
        else:
            self._in_turn(prompt, interrupted)

    def _as_json(self, prompt: str) -> None:
        unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
        for name, chat in zip(self.names, self.chats, strict=True):
            answer = [*chat.answer(prompt, **self.settings)][-1]
            assert not isinstance(answer, str)
            told = {**({"model": name} if len(self.chats) > 1 else {}), **answer.as_json()}
            sys.stdout.write(json.dumps(told, ensure_ascii=not unicode) + "\n")
            sys.stdout.flush()

    def _in_turn(self, prompt: str, interrupted: Callable[[], bool]) -> None:
        from prefmix.cli.texts import plain

        for name, chat in zip(self.names, self.chats, strict=True):
            if len(self.chats) > 1:
                say((plain(name), "bold"))
            for part in chat.answer(prompt, **self.settings, interrupted=interrupted):
                if isinstance(part, str):
                    sys.stdout.write(plain(part))
                else:
                    sys.stdout.write("\n")
                    sys.stdout.flush()
                    say((_ended(part, chat), "dim"), on=err())
                sys.stdout.flush()

    def _side_by_side(self, prompt: str, interrupted: Callable[[], bool]) -> None:
        """Two columns that fill while the models take turns, a token each; what is too long for the screen shows its end
        until it is done."""
        from rich.live import Live

        from prefmix.cli.texts import plain

        texts, ends = [""] * len(self.chats), [""] * len(self.chats)
        with Live(console=out(), auto_refresh=False, transient=True) as live:
            drawn = 0.0
            for number, part in self._by_turns(prompt, interrupted):
                if isinstance(part, str):
                    texts[number] += plain(part)
                else:
                    ends[number] = _ended(part, self.chats[number])
                if time.monotonic() - drawn > _REDRAW_S:
                    live.update(self._columns(texts, ends, out().height - 4), refresh=True)
                    drawn = time.monotonic()
        out().print(self._columns(texts, ends, None))

    def _by_turns(self, prompt: str, interrupted: Callable[[], bool]) -> Iterator[tuple[int, str | Answer]]:
        running = {
            number: chat.answer(prompt, **self.settings, interrupted=interrupted)
            for number, chat in enumerate(self.chats)
        }
        while running:
            for number, parts in list(running.items()):
                part = next(parts)
                if not isinstance(part, str):
                    del running[number]
                yield number, part

    def _columns(self, texts: Sequence[str], ends: Sequence[str], most_lines: int | None) -> Any:
        from rich.table import Table
        from rich.text import Text

        from prefmix.cli.texts import plain

        width = (out().width - 3) // len(texts)
        table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="bold")
        cells, notes = [], []
        for name, text, end in zip(self.names, texts, ends, strict=True):
            table.add_column(Text(plain(name), overflow="ellipsis", no_wrap=True), width=width, overflow="fold")
            lines = Text(text).wrap(out(), width, overflow="fold")
            cells.append(Text("\n").join(lines[-most_lines:] if most_lines else lines))
            notes.append(Text(end, "dim"))
        table.add_row(*cells)
        table.add_row(*notes)
        return table


def _ended(answer: Answer, chat: Conversation) -> str:
    """`8 tokens, 14.6 tokens/s, stop (<|im_end|>)`."""
    from prefmix.model.chat import LENGTH, STOP, STOPPED

    end = chat.tokenizer.eos_token
    told = {
        STOP: f"stop ({end})",
        LENGTH: f"length (cut at {answer.tokens:,} tokens)",
        STOPPED: "interrupted",
    }
    why = told.get(answer.finish_reason, f"ended with {answer.finish_reason}, not with {end}")
    return f"{answer.tokens:,} token{'s' * (answer.tokens != 1)}, {answer.tokens_per_s:,.1f} tokens/s, {why}"


def _in_a_terminal(talk: _Talk) -> None:
    """Reads prompts until Ctrl-D, /quit or a second Ctrl-C."""
    with suppress(ImportError):
        import readline  # noqa: F401 (lines can be edited, and called back)
    say((" against ".join(talk.names), "bold"), ("  /help, Ctrl-D leaves", "dim"), on=err())
    pressed = False
    while True:
        try:
            line = input("\n> ")
        except EOFError:
            say("", on=err())
            return
        except KeyboardInterrupt:
            if pressed:
                return
            pressed = True
            say(("\nCtrl-C again leaves", "dim"), on=err())
            continue
        pressed = False
        try:
            with _Interrupts() as interrupts:
                if not talk.take(line, interrupts.heard):
                    return
        except KeyboardInterrupt:
            return
        except ModelError as error:
            say(("error: ", "bold red"), str(error), on=err())


class _Interrupts:
    """While an answer is written, the first Ctrl-C is heard and the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._heard = False

    def heard(self) -> bool:
        return self._heard

    def __enter__(self) -> _Interrupts:
        self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _hear(self, *_: object) -> None:
        if self._heard:
            raise KeyboardInterrupt
        self._heard = True
