"""A conversation with a model, answered piece by piece.

chat = open_conversation("runs/smollm2", system="Be brief.")
for part in chat.answer("What is a margin?", max_tokens=200):
    ...                                   # str: a piece of the answer; at the end an Answer
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from prefmix.errors import ModelError
from prefmix.model.find import find_model, load_model

STOP, LENGTH, STOPPED = "stop", "length", "interrupted"
_UNFINISHED = "\ufffd"  # what the bytes of half a character are decoded to


@dataclass(frozen=True)
class Answer:
    """An answer that has ended. `tokens` counts the one that ended it; `seconds` is computing alone, the prompt included.

    `finish_reason` is "stop" (the token that ends a turn, `<|im_end|>`), "length" (the bound, or the end of what the model
    can see), "interrupted", or the text of another token that the model ends texts with.
    """

    prompt: str
    answer: str
    tokens: int
    finish_reason: str
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def as_json(self) -> dict[str, Any]:
        facts = asdict(self)
        del facts["seconds"]
        return {**facts, "tokens_per_s": round(self.tokens_per_s, 2)}


def open_conversation(reference: str, base: str | None = None, system: str | None = None) -> Conversation:
    """A conversation with the model of a run, of a folder or of the Hub, loaded as it was trained.

    Raises ModelError, as `find_model` and `load_model`, and for a model without a chat template; HubError.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Conversation(*load_model(find_model(reference, base)), system)


class Conversation:
    """The turns with one model, under its own chat template."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast, system: str | None = None) -> None:
        """Raises ModelError when the tokenizer has no chat template."""
        if not tokenizer.chat_template:
            raise ModelError(
                f"{tokenizer.name_or_path} has no chat template, so it does not know turns. Models that prefmix trained have "
                f"one; for another put the template it was trained with into chat_template.jinja in its folder."
            )
        self.model, self.tokenizer = model, tokenizer
        known = model.generation_config.eos_token_id
        self._ends = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
        specials = sorted((each.content for each in tokenizer.added_tokens_decoder.values() if each.special), key=len)
        self._special = re.compile("|".join(map(re.escape, reversed(specials))) or r"(?!)")
        self.start(system)

    def start(self, system: str | None = None) -> None:
        """Forgets all turns."""
        self.turns = [{"role": "system", "content": system}] if system else []

    def answer(
        self,
        prompt: str,
        *,
        max_tokens: int = 512,
        temperature: float = 0.0,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[str | Answer]:
        """Yields the pieces of the answer to `prompt`, then the Answer, which is a turn from then on (interrupted or not).

        The next token is the likeliest at `temperature` 0, else sampled. `interrupted` is asked between tokens.

        Raises ModelError when the conversation is longer than what the model can see, or its template refuses it.
        """
        turns = [*self.turns, {"role": "user", "content": prompt}]
        ids = self.token_ids(turns)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or len(ids) + max_tokens
        if len(ids) >= limit:
            raise ModelError(
                f"The conversation has {len(ids):,} tokens, and the model sees {limit:,}: start a new one."
            )
        room = min(max_tokens, limit - len(ids))
        text, made, reason, seconds = "", [], None, 0.0
        feed, past = ids, None
        while reason is None:
            started = time.perf_counter()
            token, past = self._next(feed, past, temperature)
            seconds += time.perf_counter() - started
            made.append(token)
            feed = [token]
            if token in self._ends:
                reason = (
                    STOP if token == self.tokenizer.eos_token_id else str(self.tokenizer.convert_ids_to_tokens(token))
                )
            elif interrupted():
                reason = STOPPED
            elif len(made) == room:
                reason = LENGTH
            whole = self._text(made[:-1] if token in self._ends else made)
            if reason is not None or not whole.endswith(_UNFINISHED):
                if len(whole) > len(text):
                    yield whole[len(text) :]
                text = whole
        self.turns = [*turns, {"role": "assistant", "content": text}]
        yield Answer(prompt, text, len(made), reason, seconds)

    def token_ids(self, turns: list[dict[str, str]]) -> list[int]:
        """The ids of a conversation, with the header of the answer. What stands in a turn is text: a `<|im_end|>` in it
        becomes the ids of its characters, not the token that ends a turn."""
        kept: list[str] = []

        def keep(match: re.Match[str]) -> str:
            kept.append(match[0])
            return f"{mark}{len(kept) - 1}{mark}"

        mark = next(chr(code) for code in range(0xE000, 0xF900) if not any(chr(code) in t["content"] for t in turns))
        marked = [{**turn, "content": self._special.sub(keep, turn["content"])} for turn in turns]
        try:
            text = str(self.tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True))
        except (TemplateError, ValueError, TypeError) as error:
            raise ModelError(
                f"The chat template of {self.tokenizer.name_or_path} refuses this conversation: {error}"
            ) from error
        if not kept:
            return self.tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = []
        for part in re.split(f"({self._special.pattern})", text):
            if self._special.fullmatch(part):
                ids.append(self.tokenizer.added_tokens_encoder[part])
            elif part:
                plain = re.sub(f"{mark}([0-9]+){mark}", lambda match: kept[int(match[1])], part)
                ids += self.tokenizer.encode(plain, add_special_tokens=False, split_special_tokens=True)
        return ids

    def _text(self, ids: list[int]) -> str:
        """What was generated, as it is: special tokens too, since a model that writes them has a fault."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @torch.inference_mode()
    def _next(self, ids: list[int], past: Any, temperature: float) -> tuple[int, Any]:
        """The next token after ids that follow those in `past`, and the cache of both."""
        batch = torch.tensor([ids], device=self.model.device)
        output = self.model(input_ids=batch, past_key_values=past, use_cache=True, logits_to_keep=1)
        logits = output.logits[0, -1].float()
        if temperature > 0:
            token = torch.multinomial((logits / temperature).softmax(dim=-1), 1)
        else:
            token = logits.argmax(dim=-1, keepdim=True)
        return int(token), output.past_key_values
