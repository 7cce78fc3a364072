"""The filter rules: what each one looks at, its reason literal and its evidence.

By default only what cannot be trained on is dropped; the rest is reported (`prefmix.audit` counts it). "The answer" is
the one that is trained towards: `chosen` of a pair, the last message of a conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import polars as pl

from prefmix.chatml import SPECIAL_TOKENS, has_special_tokens, strip_special_tokens
from prefmix.language import is_language
from prefmix.ledger import Drop, mark
from prefmix.recipe import Chars, Filter
from prefmix.schema import CHANGE, CONTENT, PARTS, ROLE, Kind, answers, contents, prompt_text

MARGIN = pl.col("chosen_score") - pl.col("rejected_score")

# A refusal opens the answer: searched anywhere, "I'm sorry to hear that ..." would count two to ten times as often. It
# names what will not be done ("we cannot determine the angle" is an answer), or an AI that says what it lacks.
_CANNOT = (
    r"(?:can(?:'|’)?t|can ?not|could(?:n(?:'|’)t| not)|won(?:'|’)t|will not|(?:am |are |'m |’m |'re )?(?:unable|not (?:able|"
    r"comfortable|allowed|permitted))|(?:do not|don(?:'|’)t) (?:feel comfortable|have the ability))"
)
_DEEDS = (
    r"(?:answer|assist|help|provide|fulfill?|comply|engage|create|generate|write|compose|discuss|support|offer|give|do"
    r"|complete|continue|produce|participate|condone|recommend|advise|share|tell|suggest|encourage|promote|respond|make|display)"
)
_AN_AI = r"an? (?:[\w-]+ ){0,2}(?:ai|a\.i\.|artificial intelligence|language model|chatbot)\b"
REFUSAL = (
    r"(?i)^\W*(?:(?:hi|hello|hey)\b[^.!\n]{0,20}[.!,]\s+)?(?:"
    r"(?:(?:i|we)(?:'m|’m| am|'re| are) )?(?:(?:so|very|really|truly) )?(?:sorry|apologi[sz]e|my apologies|apologies|unfortunately|i regret)\b"
    rf"[^.!?\n]{{0,80}}?\b(?:i|we) ?{_CANNOT} (?:to |with )?(?:\w+ly )?{_DEEDS}\b"
    rf"|i ?{_CANNOT} (?:to )?(?:\w+ly )?{_DEEDS}\b"
    rf"|(?:as|being|i(?:'m|’m| am)(?: just| only)?) {_AN_AI}[^.!?\n]{{0,80}}?\b(?:i|my)\b[^.!?\n]{{0,30}}?"
    r"\b(?:don(?:'|’)t|do not|can(?:'|’)?t|can ?not|am not|not able|am unable|unable|lack|have no|won(?:'|’)t|will not|not have|not capable)\b"
    r")"
)
#: "I have no access to real-time data": honest, not a refusal, a class of its own.
DISCLAIMER = (
    r"(?i)real[- ]time (?:data|information|access|weather|news|updates)|knowledge cut-?off"
    r"|(?:can ?not|can't|unable to|not able to|don't have the (?:ability|capability) to|do not have the (?:ability|capability) to) "
    r"(?:browse|access|search) (?:the )?(?:internet|web|current|live)"
    r"|(?:my|as of my) (?:last (?:knowledge )?(?:update|training)|training data (?:only )?(?:goes|extends))"
    r"|(?:don't|do not) have (?:access to )?(?:current|live|up-to-date|the latest) (?:data|information|news)"
)
PLACEHOLDER = r"\{\{\s*\w[\w .-]{0,40}\}\}|(?i:\[insert [^\]\n]{1,80}\]|<insert [^>\n]{1,80}>)"
_HEAD_CHARS = 400  # a refusal or a disclaimer stands at the beginning
_LONG_CHARS = 200  # a shorter answer without a full stop is a short answer, not one that was cut off

#: A conversation: perhaps a system message, then the user, then answers; an assistant may call tools before it answers.
CONVERSATION = r"^s?(?:u(?:at+)*a)+$"


def apply(rows: pl.DataFrame, settings: Filter, kind: Kind) -> pl.DataFrame:
    """Changes rows where the recipe asks for it (strip, swap), then marks what the rules drop."""
    if settings.injection == "strip":
        rows = _strip_injection(rows, kind)
    if kind == "preference" and settings.on_inverted == "swap":
        rows = _swap_inverted(rows)
    return mark(rows, rules(settings, kind, "drop"))


def rules(settings: Filter, kind: Kind, action: str) -> list[Drop]:
    """The rules that are set to `action` ("drop" or "report"), in their order: the first that holds is the reason."""
    answer = answers(kind)[0]
    opening = answer.str.head(_HEAD_CHARS)
    disclaimer = opening.str.contains(DISCLAIMER)

    def chosen(*named: tuple[str, str, Callable[[], Drop]]) -> list[Drop]:
        return [rule()._replace(reason=reason) for key, reason, rule in named if getattr(settings, key) == action]

    found = chosen(
        ("injection", "filter/injection", lambda: _injection(kind)),
        ("empty", "filter/empty", lambda: _empty(kind)),
        ("roles", "filter/roles", lambda: _roles(kind)),
    )
    if kind == "preference":
        found += [*chosen(("identical", "filter/identical", _identical)), *_scores(settings, action)]
    found += chosen(
        ("refusals", "filter/refusal", lambda: _opening(opening.str.contains(REFUSAL) & ~disclaimer, answer)),
        ("disclaimers", "filter/disclaimer", lambda: _opening(disclaimer, answer)),
        ("placeholders", "filter/placeholder", lambda: _placeholder(kind)),
        ("cut_off", "filter/cut_off", lambda: _cut_off(answer)),
    )
    if action == "drop":
        found += [*_language(settings, answer), *_characters(settings, kind)]
    return found


def in_tokens(settings: Filter, kind: Kind) -> list[Drop]:
    """The limits in tokens, for rows that have their token counts."""
    if kind == "preference":
        prompt, longest = pl.col("prompt_tokens"), pl.max_horizontal("chosen_tokens", "rejected_tokens")
        total = prompt + longest
    else:
        prompt, total = pl.col("prompt_tokens"), pl.col("tokens")
        longest = total - prompt
    limits = [("max_prompt_tokens", prompt), ("max_answer_tokens", longest), ("max_tokens", total)]
    return [
        Drop(f"filter/{key}", count > limit, pl.struct(tokens=count, limit=pl.lit(limit)))
        for key, count in limits
        if (limit := getattr(settings, key)) is not None
    ]


def _strip_injection(rows: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    touched = pl.any_horizontal(has_special_tokens(part) for part in PARTS[kind])
    tokens = _special_tokens(kind)
    stripped = [pl.col(part).map_batches(strip_special_tokens, is_elementwise=True) for part in PARTS[kind]]
    return rows.with_columns(changed(touched, "strip", pl.struct(tokens=tokens))).with_columns(stripped)


def _swap_inverted(rows: pl.DataFrame) -> pl.DataFrame:
    inverted = MARGIN < 0
    pairs = [("chosen", "rejected"), ("chosen_score", "rejected_score")]
    swapped = [
        pl.when(inverted).then(pl.col(theirs)).otherwise(pl.col(ours)).alias(ours)
        for one, other in pairs
        for ours, theirs in ((one, other), (other, one))
    ]
    detail = pl.struct("chosen_score", "rejected_score")
    return rows.with_columns(changed(inverted, "swap", detail)).with_columns(swapped)


def changed(when: pl.Expr, change: str, detail: pl.Expr) -> pl.Expr:
    """Adds a record to `changes` of the rows for which `when` holds: the row stays, but not as it was read."""
    record = pl.struct(change=pl.lit(change), detail=detail.struct.json_encode()).cast(CHANGE)
    return pl.when(when).then(pl.concat_list("changes", record)).otherwise("changes").alias("changes")


def _special_tokens(kind: Kind) -> pl.Expr:
    """list<string>: the distinct special tokens inside the contents of a row, sorted."""
    found = [pl.col(part).list.eval(CONTENT.str.extract_all(SPECIAL_TOKENS).list.explode()) for part in PARTS[kind]]
    return pl.concat_list(found).list.drop_nulls().list.unique().list.sort()


def _injection(kind: Kind) -> Drop:
    touched = pl.any_horizontal(has_special_tokens(part) for part in PARTS[kind])
    return Drop("", touched, pl.struct(tokens=_special_tokens(kind)))


def _empty(kind: Kind) -> Drop:
    """A blank turn: nothing but white space and invisible characters. Calls of a tool may be blank, and a blank system
    message changes nothing."""
    blank = CONTENT.str.contains(r"^[\s\p{Cf}]*$") & ROLE.is_in(["user", "assistant"])
    parts = {part: pl.col(part).list.eval(blank).list.any() | (pl.col(part).list.len() == 0) for part in PARTS[kind]}
    which = pl.coalesce(pl.when(empty).then(pl.lit(part)) for part, empty in parts.items())
    return Drop("", pl.any_horizontal(parts.values()), pl.struct(part=which))


def _roles(kind: Kind) -> Drop:
    def letters(part: str) -> pl.Expr:
        return pl.col(part).list.eval(ROLE.str.head(1)).list.join("")

    if kind == "sft":
        wrong = ~letters("messages").str.contains(CONVERSATION)
        shown = pl.col("messages").list.eval(ROLE)
    else:
        wrong = pl.any_horizontal(
            ~pl.concat_str(letters("prompt"), letters(answer)).str.contains(CONVERSATION)
            | ~letters(answer).str.starts_with("a")
            for answer in ("chosen", "rejected")
        )
        shown = pl.concat_list(pl.col(part).list.eval(ROLE) for part in ("prompt", "chosen"))
    return Drop("", wrong, pl.struct(roles=shown.list.join(" ")))


def _identical() -> Drop:
    """chosen equals rejected up to white space, invisible characters and Unicode composition. Case and punctuation
    count: `a - b` and `a + b` are two answers."""

    def squeeze(text: pl.Series) -> pl.Series:
        return text.str.replace_all(r"[\s\p{Cf}]+", " ").str.strip_chars(" ").str.normalize("NFC")

    def may_equal(one: pl.Series, other: pl.Series) -> pl.Series:
        """Whether two beginnings (or endings) of 64 characters can belong to equal answers, at little cost: in ASCII the
        far 24 of at least 40 must agree, but for white space."""
        bare = [side.str.replace_all(r"\s+", "") for side in (one, other)]
        plain = [(side.str.len_bytes() == side.str.len_chars()) & (side.str.len_bytes() >= 40) for side in bare]
        same_end = (bare[0].str.head(24) == bare[1].str.head(24)) | (bare[0].str.tail(24) == bare[1].str.tail(24))
        return ~plain[0] | ~plain[1] | same_end

    def same(pair: pl.Series) -> pl.Series:
        sides = [pair.struct.field("chosen"), pair.struct.field("rejected")]
        result = (sides[0] == sides[1]).fill_null(False)
        left = (~result).arg_true()
        for cut in (lambda text: text.str.head(64), lambda text: text.str.tail(64), squeeze):
            one, other = (cut(side.gather(left)) for side in sides)
            left = left.filter(may_equal(one, other).fill_null(False) if cut is not squeeze else one == other)
        return result.scatter(left, True)

    chosen, rejected = answers("preference")
    pair = pl.struct(chosen=chosen, rejected=rejected)
    return Drop("", pair.map_batches(same, return_dtype=pl.Boolean, is_elementwise=True))


def _scores(settings: Filter, action: str) -> list[Drop]:
    detail = pl.struct("chosen_score", "rejected_score")
    min_margin, min_score = settings.min_margin, settings.min_score
    found = []
    if settings.on_inverted == action:
        found.append(Drop("filter/inverted", MARGIN < 0, detail))
    if min_margin == "report" == action:
        found.append(Drop("filter/tie", MARGIN == 0, detail))
    elif isinstance(min_margin, int | float) and action == "drop":
        if min_margin >= 0:
            found.append(Drop("filter/tie", MARGIN == 0, detail))
        found.append(Drop("filter/margin", MARGIN.le(min_margin), detail))
    if min_score is not None and action == "drop":
        found.append(Drop("filter/min_score", pl.col("chosen_score") < min_score, detail))
    return found


def _opening(when: pl.Expr, answer: pl.Expr) -> Drop:
    return Drop("", when, pl.struct(opening=answer.str.head(100)))


def _placeholder(kind: Kind) -> Drop:
    """`{{name}}` or `[insert ...]` in the prompt or in the answer that is trained towards."""
    parts = ("prompt", "chosen") if kind == "preference" else ("messages",)
    when = pl.any_horizontal(pl.col(part).list.eval(CONTENT.str.contains(PLACEHOLDER)).list.any() for part in parts)
    first = pl.concat_list(contents(part) for part in parts).list.join("\n").str.extract(f"({PLACEHOLDER})")
    return Drop("", when, pl.struct(placeholder=first))


def _cut_off(answer: pl.Expr) -> Drop:
    """A long answer that stops inside a sentence, or inside a block of code."""
    text = answer.str.strip_chars()
    last_line = text.str.tail(160).str.split("\n").list.last()
    in_sentence = (
        text.str.tail(1).str.contains(r"[\p{L}\p{N},(\[{“‘]")
        & (last_line.str.len_chars() > 40)
        & ~last_line.str.contains(r"^\s*(?:[-*•#|>$\\]|\d+[.)])|https?://\S+$|\s{4}|[=;{}]")
    )
    in_code = text.str.count_matches("```", literal=True) % 2 == 1
    return Drop(
        "", (text.str.len_chars() >= _LONG_CHARS) & (in_sentence | in_code), pl.struct(ending=text.str.tail(60))
    )


def _language(settings: Filter, answer: pl.Expr) -> list[Drop]:
    languages: Sequence[str] = settings.languages
    if not languages:
        return []
    other = ~answer.map_batches(
        lambda texts: is_language(texts, languages), return_dtype=pl.Boolean, is_elementwise=True
    )
    return [Drop("filter/language", other, pl.struct(opening=answer.str.head(100)))]


def _characters(settings: Filter, kind: Kind) -> list[Drop]:
    """Limits in characters (Unicode code points), and the ratio of chosen to rejected."""
    lengths = [answer.str.len_chars() for answer in answers(kind)]
    prompt = prompt_text(kind).str.len_chars()
    found = []
    for key, too_long in (("min_chars", False), ("max_chars", True)):
        limits: Chars | None = getattr(settings, key)
        if limits is None:
            continue
        extreme = pl.max_horizontal(lengths) if too_long else pl.min_horizontal(lengths)
        counts = {"prompt": prompt, "answer": extreme, "total": prompt + pl.max_horizontal(lengths)}
        for part, count in counts.items():
            if (limit := getattr(limits, part)) is not None:
                when = count > limit if too_long else count < limit
                detail = pl.struct(part=pl.lit(part), characters=count, limit=pl.lit(limit))
                found.append(Drop(f"filter/{key}", when, detail))
    ratio = settings.max_length_ratio
    if kind == "preference" and ratio is not None:
        value = lengths[0] / pl.max_horizontal(lengths[1], pl.lit(1))
        found.append(Drop("filter/max_length_ratio", value > ratio, pl.struct(ratio=value.round(2))))
    return found
