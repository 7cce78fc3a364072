def _lines(name: str, found: Sequence[Found], left_out: Sequence[LeftOut]) -> Iterator[str]:
    """The lines of the recipe. `# ` begins an explanation; `#` right before a key is an option that is not in force."""
    yield "# A starter recipe, written by `prefmix init`. Every key: `prefmix schema`, docs/recipes.md."
    yield "# A line that begins with # and a key is an option: remove the # to use it."
    yield ""
    yield f"name = {_toml(name)}"
    yield "seed = 42                        # decides the order of the rows and the splits, on every machine alike"
    yield "#license = \"apache-2.0\"          # of the mixture; absent: the strictest of its sources"
    yield ""
    yield "# The order of the sources is their priority: of two equal rows, the one of the earlier source stays."
    for number, each in enumerate(found):
        yield from _source_lines(each, with_options=number == 0)
    for each in left_out:
        yield from _left_out_lines(each)
    yield from _settings_lines(found)


def _source_lines(each: Found, with_options: bool) -> Iterator[str]:
    source = each.source
    columns = union(files.schema(file.path) for file in source.files[:1])
    used = [column for column in columns if column in source.layout.types]
    other = [column for column in columns if column not in source.layout.types]
    rows = source.count_rows()
    many = f"{len(source.files)} files, " if len(source.files) > 1 else ""
    yield ""
    yield f"[sources.{each.name}]"
    yield f"# {many}{f'{rows:,} rows' if rows is not None else f'{each.bytes:,} bytes'}; {source.kind} rows"
    not_read = f"; not read: {', '.join(map(_one_line, other))}" if other else ""
    yield f"# read: {', '.join(map(_one_line, used))}{not_read}"
    if each.beside:
        shown = ", ".join(map(_one_line, each.beside[:4]))
        yield f"# left aside, because they are other splits: {shown}{' ...' if len(each.beside) > 4 else ''}"
    yield f"format = {_toml(source.format)}"
    for key, value in each.origin.items():
        yield f"{key} = {_toml(value)}"
    hub = source.spec.hub
    if hub:
        yield f'revision = "main"                # now {source.revision}'
    if not (hub and hub in KNOWN_LICENCES):
        yield '#license = "..."                  # of this data'
    if with_options:
        text = next((column for column in used if source.layout.types[column] == TEXT), None)
        if text and re.fullmatch(r"\w+", text):
            yield f'#where = "length({text}) < 4000"'
            yield "# (Polars SQL on the columns of the files)"
        yield "#take = 5000                      # at most so many of the rows that survive; 0.5 is half of them"
        yield "#repeat = 2                       # each row so many times"


def _left_out_lines(each: LeftOut) -> Iterator[str]:
    yield ""
    yield f"# {_one_line(each.reason)}"
    for keys in each.nearest[:1]:
        yield f"#[sources.{each.name}]"
        yield from (f"#{key}" for key in keys)
        yield from (f"#{key} = {_toml(value)}" for key, value in each.origin.items())


def _settings_lines(found: Sequence[Found]) -> Iterator[str]:
    yield from (
        "",
        '[filter]                         # "drop", "report" or "off"; rules that are not named keep their defaults',
        '#languages = ["en"]              # rows in other languages are dropped',
        '#refusals = "report"             # refusals are dropped unless this says otherwise',
        '#cut_off = "drop"                # answers that end in the middle are only reported',
        '#placeholders = "drop"           # {{name}}, [insert ...]: likewise',
    )
    if any(each.source.kind == "preference" for each in found):
        yield "#min_margin = 0.5                # chosen_score - rejected_score must be above this; ties are dropped anyway"
        yield '#on_inverted = "swap"            # the rejected answer has the higher score: dropped unless swapped'
        yield "#max_length_ratio = 4.0          # characters of chosen to rejected"
    yield from (
        "#max_tokens = 2048               # prompt and longer answer; needs [format] tokenizer",
        "",
        "[dedupe]",
        'exact = "pair"                   # or "prompt" (one row for each prompt), "off"',
        "#prompt_cap = 4                  # at most so many pairs of one prompt",
        "",
        "[format]",
        'template = "chatml"',
        'layout = "text"                  # or "messages"',
        '#system = "drop"                 # system messages are kept; or a text for rows that have none',
        '#tokenizer = "teknium/OpenHermes-2.5-Mistral-7B"     # Hub name or folder, to count tokens',
    )
    by_kind = {kind: [each.name for each in found if each.source.kind == kind] for kind in KINDS}
    mixed = {kind: names for kind, names in by_kind.items() if len(names) > 1}
    yield from (("", "#[mix]                           # shares; without them everything that survives is kept") if mixed else ())
    for kind, names in mixed.items():
        yield f"#{kind} = {{ {', '.join(f'{name} = 1' for name in names)} }}"
    yield from (
        "",
        "[splits]",
        "test = 0.02                      # held out; rows with the same prompt land on the same side",
    )
