"""The model card of a stage (README.md) and its curves (curves.svg), made from run.json, eos.json, metrics.jsonl and the
manifest of the mixture.

Whatever comes from data (names, licences, reasons, versions) is shown as code in Markdown, on one line, and is escaped in
the SVG: a name cannot become a link, a heading, a key of the YAML or an element. Neither half needs torch.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import yaml

from prefmix.card import STRICTNESS, UNKNOWN
from prefmix.chatml import ANSWER_HEADER, END, START
from prefmix.errors import TrainError

CARD, CURVES = "README.md", "curves.svg"
NOT_MEASURED = "not measured"

_HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def write_report(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes README.md and curves.svg into a stage folder; `manifest` is the mixture.json of what it was trained on.

    Raises TrainError when the folder's record is missing or cannot be read, or is about another mixture.
    """
    run, eos = _read(folder / "run.json"), _read(folder / "eos.json")
    if run["mixture"]["digest"] != manifest["digest"]:
        raise TrainError(
            f"{folder} was trained on the mixture {run['mixture']['digest'][:12]}, and the manifest given for its card "
            f"is that of {manifest['digest'][:12]}. Give the mixture that run.json names."
        )
    metrics = _read_lines(folder / "metrics.jsonl")
    stages = _stages(folder, run)
    story = run_table(stages) if len(stages) > 1 else ""
    texts = {CURVES: curves(metrics, eos), CARD: model_card(run, eos, metrics, manifest, story)}
    for name, text in texts.items():
        (folder / f".{name}").write_text(text, encoding="utf-8", newline="\n")
    for name in texts:
        os.replace(folder / f".{name}", folder / name)


def run_table(stage_folders: Sequence[Path]) -> str:
    """A Markdown table of what each stage did to the EOS, from the eos.json of the folders, in their order."""
    rows = []
    for folder in stage_folders:
        eos = _read(folder / "eos.json")
        before, after = eos.get("before") or {}, eos.get("after") or {}
        rows.append(
            [
                _code(folder.name),
                f"{_figure(before.get('p_eos'))} → {_figure(after.get('p_eos'))}",
                f"{_share(before.get('stop_rate'))} → {_share(after.get('stop_rate'))}",
            ]
        )
    return _table(["stage", "P(EOS), before → after", "stop rate, before → after"], rows)


def _stages(folder: Path, run: Mapping[str, Any]) -> list[Path]:
    """The folders of the stages that a stage goes on from, the first one first, and its own."""
    chain = [folder]
    while run.get("after_stage"):
        before = folder.parent / Path(run["after_stage"]).name
        if before in chain or not (before / "run.json").is_file():
            break
        chain.append(before)
        run = _read(before / "run.json")
    return chain[::-1]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError(f"{path} cannot be read ({error}). Run its stage again with --force.") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line; none when there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise TrainError(f"{path}, line {number}, is not JSON ({error}). Remove the line.") from error
    return found


# The card.


def model_card(
    run: Mapping[str, Any],
    eos: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
    story: str = "",
) -> str:
    """README.md of a stage: a model card as the Hub reads it.

    `metrics` are the lines of metrics.jsonl, `manifest` is mixture.json. `story` is the table of the EOS over the stages
    of the run (`run_table`), for a stage that goes on from another one.
    """
    mixture, method = run["mixture"], run["method"].upper()
    sections = [
        f"---\n{yaml.safe_dump(_head(run, manifest), sort_keys=False, allow_unicode=True, width=math.inf)}---",
        f"# {_code(mixture['name'])}, stage {_code(run['stage'])}: {method}",
        _what_it_is(run, eos),
        "## Prompt format",
        *_prompt_format(run),
        "## Does it end its turn?",
        *_eos(run, eos),
        *(["Over the stages of this run:", story] if story else []),
        "## Training data",
        *_training_data(run, manifest),
        "## Hyper-parameters",
        _table(["setting", "value"], [[_code(key), _code(value)] for key, value in _flat(run["hyperparameters"])]),
        "## Training",
        _table(["what", "value"], list(_training(run, metrics))),
        f"![Loss, EOS and learning rate over the steps of this stage]({CURVES})",
        "## Versions",
        _table(["package", "version"], [[_code(name), _code(number)] for name, number in run["versions"].items()]),
        "## How to reproduce it",
        *_how_to_reproduce(run),
        "## Limits",
        *_limits(run, eos, manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _head(run: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    settings = run["hyperparameters"]
    lora, nf4 = settings["adapter"] == "lora", settings["quantization"] == "nf4"
    head: dict[str, Any] = {}
    if _on_hub(run["base"]):  # the Hub takes no other names: a folder is named in the text only
        head["base_model"] = run["base"]["name"]
    head["base_model_relation"] = "adapter" if lora else "finetune"
    head["library_name"] = "peft" if lora else "transformers"
    head["pipeline_tag"] = "text-generation"
    licence = _one_line(manifest["license"])
    if licence in (*STRICTNESS, UNKNOWN):
        head["license"] = licence
    else:
        head |= {"license": "other", "license_name": licence}
    sources = (entry.get("hub") or "" for entry in manifest["sources"].values())
    if datasets := list(dict.fromkeys(name for name in sources if _HUB_NAME.fullmatch(name))):
        head["datasets"] = datasets
    adapter = ["qlora" if nf4 else "lora"] if lora else []
    head["tags"] = [run["method"], *adapter, "chatml", "prefmix", "trl"]
    return head


def _on_hub(base: Mapping[str, Any]) -> bool:
    """Whether a base came from the Hub: a folder has no commit."""
    return bool(base["revision"] and _HUB_NAME.fullmatch(base["name"]))


def _base(base: Mapping[str, Any]) -> str:
    if not _on_hub(base):
        return f"{_code(base['name'])}, a folder"
    return f"[{base['name']}](https://huggingface.co/{base['name']}) at {_code(base['revision'][:12])}"


def _what_it_is(run: Mapping[str, Any], eos: Mapping[str, Any]) -> str:
    settings, mixture = run["hyperparameters"], run["mixture"]
    if settings["adapter"] == "lora":
        kind = "A qLoRA adapter" if settings["quantization"] == "nf4" else "A LoRA adapter"
        made = f"{kind} (in `adapter/`) for {_base(run['base'])}"
    else:
        made = f"A model (in `adapter/`), all weights of which were trained, from {_base(run['base'])}"
    how = (
        f"trained with direct preference optimisation (loss {_code(_plain(settings.get('loss')))}) on"
        if run["method"] == "dpo"
        else "fine-tuned on the answers of"
    )
    ends = "Whether its answers end by themselves was not measured."
    if (rate := (eos.get("after") or {}).get("stop_rate")) is not None:
        first = _share((eos.get("before") or {}).get("stop_rate"))
        ends = f"After the stage {_share(rate)} of its answers ended by themselves (before it: {first})."
    goes_on = f" It goes on from the stage {_code(run['after_stage'])}." if run.get("after_stage") else ""
    return (
        f"{made}, {how} {_count(run['rows'], 'row')} of the mixture {_code(_reference(mixture))} in ChatML, by prefmix "
        f"{_code(run['versions'].get('prefmix'))} with TRL.{goes_on} {ends}"
    )


def _reference(mixture: Mapping[str, Any]) -> str:
    """How a mixture is named on the command line."""
    return f"{mixture['name']}@{mixture['version'] or mixture['digest'][:12]}"


def _prompt_format(run: Mapping[str, Any]) -> list[str]:
    example = (
        f"{START}system\nYou are a helpful assistant.{END}\n{START}user\nWho wrote Faust?{END}\n"
        f"{ANSWER_HEADER}Goethe.{END}"
    )
    return [
        f"ChatML; the system turn may be left out. The model's answer ends on `{END}`, which is the tokenizer's EOS.",
        f"```\n{example}\n```",
        "The tokenizer in `adapter/` has this as its chat template. With transformers, accelerate"
        f"{' and PEFT' if run['hyperparameters']['adapter'] == 'lora' else ''}, in the folder of this card:",
        f"```python\n{_code_to_load(run)}\n```",
    ]


_GENERATE = """
messages = [{"role": "user", "content": "Who wrote Faust?"}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(
    **prompt, max_new_tokens=256, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
)
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _code_to_load(run: Mapping[str, Any]) -> str:
    """A program that runs in the stage's folder."""
    base, lora = run["base"], run["hyperparameters"]["adapter"] == "lora"
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("adapter")',
    ]
    if lora:
        lines.insert(0, "from peft import PeftModel")
        if not _on_hub(base):
            lines.append("# The base is a folder, named as in the recipe.")
        at = f", revision={_literal(base['revision'])}" if _on_hub(base) else ""
        lines.append(f'model = AutoModelForCausalLM.from_pretrained({_literal(base["name"])}{at}, device_map="auto")')
        if run["tokenizer"]["added"]:
            lines.append("if len(tokenizer) > model.get_input_embeddings().num_embeddings:")
            lines.append("    model.resize_token_embeddings(len(tokenizer))  # ChatML's tokens were added")
        lines.append('model = PeftModel.from_pretrained(model, "adapter")')
    else:
        lines.append('model = AutoModelForCausalLM.from_pretrained("adapter", device_map="auto")')
    return "\n".join(lines) + "\n" + _GENERATE


def _literal(text: str) -> str:
    """A Python string of ASCII, in double quotes where it has no quotes itself."""
    literal = ascii(text)
    return f'"{literal[1:-1]}"' if '"' not in literal else literal


def _eos(run: Mapping[str, Any], eos: Mapping[str, Any]) -> list[str]:
    settings = run["hyperparameters"]["eos"]
    before, after = eos.get("before") or {}, eos.get("after") or {}
    both = (before, after)
    rows = [
        ["P(EOS) where held-out answers end, mean", *(_figure(each.get("p_eos")) for each in both)],
        ["log P(EOS), mean", *(_figure(each.get("log_p_eos"), 3) for each in both)],
        ["stop rate", *(_share(each.get("stop_rate")) for each in both)],
        ["stop rate, greedy", *(_stopped(each.get("greedy")) for each in both)],
        ["stop rate, sampled", *(_stopped(each.get("sampled")) for each in both)],
        [f"cut at {settings['max_new_tokens']:,} tokens", *(_figure(each.get("cut")) for each in both)],
        ["generations (n)", *(_figure(each.get("n")) for each in both)],
    ]
    wanted, rate = settings["min_stop_rate"], after.get("stop_rate")
    if rate is None:
        verdict = "**Not judged**: the stage was not measured at its end."
    elif rate >= wanted:
        verdict = (
            f"**Passed**: {_share(rate)} of the generations ended by themselves, and {_share(wanted)} are asked for."
        )
    else:
        verdict = f"**Not passed**: only {_share(rate)} of the generations ended by themselves, and {_share(wanted)} are asked for."
    held_out = "" if "rows" not in eos else f" ({_count(eos['rows'], 'row')} of the {_code(eos['split'])} split)"
    return [
        f"{verdict} (`min_stop_rate`; a run is judged after its last stage.)",
        _table(["", "before the stage", "after the stage"], rows),
        f"Measured on the same answers at every stage{held_out}: the probability of `{END}` where they end, and one greedy "
        "and one sampled generation from each of their prompts. A generation has stopped when it ends on "
        f"`{END}`; one that is cut at the bound has not.",
    ]


def _stopped(stops: Mapping[str, Any] | None) -> str:
    if not stops:
        return NOT_MEASURED
    return f"{_share(stops['stopped'] / stops['n'] if stops['n'] else 0.0)} ({stops['stopped']:,} of {stops['n']:,})"


def _training_data(run: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    subset = run["hyperparameters"]["subset"]
    in_split = manifest["subsets"].get(subset, {}).get("train", {}).get("rows")
    of = "" if in_split is None else f", of {in_split:,} in its train split"
    rows = [
        [
            _code(name),
            _code(entry["kind"]),
            _source(entry),
            _code(entry["licence"]),
            *(f"{entry[key]:,}" for key in ("read", "kept")),
            _reasons(entry["dropped"]),
        ]
        for name, entry in manifest["sources"].items()
    ]
    return [
        f"The mixture {_code(_reference(run['mixture']))}, digest {_code(run['mixture']['digest'])}, made from the recipe "
        f"with the digest {_code(run['recipe_digest'])}. This stage read its `{subset}` subset: {_count(run['rows'], 'row')}{of}.",
        _table(["source", "subset", "from", "licence", "rows read", "kept", "dropped"], rows),
        f"The licence of the mixture is {_code(manifest['license'])}.",
        *_decontaminated(manifest.get("contamination") or {}),
    ]


def _source(entry: Mapping[str, Any]) -> str:
    """Where a source came from. Files of one's own have no address that would mean something to others."""
    if not entry.get("hub"):
        return f"files in the format {_code(entry['format'])}"
    revision = f" at {_code(entry['revision'][:12])}" if entry.get("revision") else ""
    if not _HUB_NAME.fullmatch(entry["hub"]):
        return _code(entry["hub"]) + revision
    return f"[{entry['hub']}](https://huggingface.co/datasets/{entry['hub']}){revision}"


def _decontaminated(report: Mapping[str, Any]) -> list[str]:
    if not report:
        return [
            "**Not decontaminated**: no benchmark was searched for in these rows. A score on one may come from having "
            "seen it."
        ]
    rows = [
        [_code(name), *(f"{entry[key]:,}" for key in ("items", "touched", "rows", "dropped"))]
        for name, entry in report.items()
    ]
    return [
        "Decontaminated against:",
        _table(["benchmark", "items", "items found", "rows that held them", "rows dropped for it"], rows),
    ]


def _flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """`key.key, value` of everything that is set."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        elif value is not None:
            yield f"{path}{key}", _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return value if isinstance(value, str) else json.dumps(value)


def _training(run: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """What and its value, of all that the record has."""
    unit = "pairs" if run["method"] == "dpo" else "rows"
    yield ["rows", f"{run['rows']:,}"]
    yield ["rows left out", _reasons(run.get("left_out") or {})]
    yield ["rows with a shortened prompt", _figure(run.get("shortened"))]
    yield ["steps", f"{run['steps']:,}"]
    yield ["epochs", _figure(run.get("epochs"))]
    if not run.get("finished"):
        yield ["finished", "no"]
        return
    timed = run.get("steps_timed", run["steps"])
    over = "" if timed == run["steps"] else f" (over the last {_count(timed, 'step')}, after a resume)"
    yield ["tokens", f"{run['tokens']:,}{over}"]
    yield ["speed", f"{_figure(run['pairs_per_s'])} {unit}/s, {_figure(run['tokens_per_s'])} tokens/s"]
    if run.get("mfu") is not None:
        yield ["model FLOP utilisation", _share(run["mfu"])]
    yield ["wall clock", _duration(run["wall_s"]) + over]
    yield ["peak memory", f"{run['peak_memory_bytes'] / 1e9:,.2f} GB ({run['peak_memory_bytes']:,} bytes)"]
    yield ["hardware", _code(_hardware(run["hardware"]))]
    losses = run.get("losses") or {}
    yield ["loss, first step", _figure(losses.get("first"))]
    yield ["loss, last step", _figure(losses.get("last"))]
    last = next((line for line in reversed(metrics) if "eval_loss" in line), {})
    for name, key in _HELD_OUT.items():
        if key in last:
            yield [f"{name}, held-out rows", _figure(last[key])]
    if run.get("adapter_sha256"):
        yield ["sha256 of the weights", _code(run["adapter_sha256"])]


_HELD_OUT = {"loss": "eval_loss", "reward margin": "eval_rewards/margins", "reward accuracy": "eval_rewards/accuracies"}


def _hardware(hardware: Mapping[str, Any]) -> str:
    number, parts = hardware.get("processes", 1), [str(hardware["device"])]
    if "memory_bytes" in hardware:
        parts.append(f"{hardware['memory_bytes'] / 1e9:,.0f} GB")
    if "threads" in hardware:
        parts.append(_count(hardware["threads"], "thread"))
    return f"{number} x {', '.join(parts)}" if number > 1 else ", ".join(parts)


def _how_to_reproduce(run: Mapping[str, Any]) -> list[str]:
    first = " The stages before it run first." if run.get("after_stage") else ""
    return [
        "```\nprefmix build recipe.toml\nprefmix train recipe.toml\n```",
        "`recipe.toml` is in the mixture's folder; its `[train]` has to say what the table of hyper-parameters says. The "
        f"build is right when its digest is {_code(run['mixture']['digest'])}. The seed is {_code(run['seed'])}.{first}",
    ]


def _limits(run: Mapping[str, Any], eos: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    limits = [
        "What the base does wrong, this model may do as well. No benchmark, and nothing about safety, was measured here.",
        "The licence above is that of the training data; the base has its own, which holds too.",
        f"It knows ChatML and nothing else: without the template, or with a generation that does not stop at `{END}`, the "
        "figures above do not hold.",
    ]
    if run["hyperparameters"]["quantization"] == "nf4":
        limits.append(
            "The adapter was trained on the base in NF4. On the base in full precision, and merged into it, answers differ "
            "a little."
        )
    if eos.get("split") == "train":
        limits.append("The mixture has no test split: the EOS was measured on rows that were also trained on.")
    if not manifest.get("contamination"):
        limits.append("Do not report a benchmark without searching the training data for it first.")
    return ["\n".join(f"- {limit}" for limit in limits)]


def _reasons(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{_code(reason)} {count:,}" for reason, count in ordered) or "none"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _figure(value: Any, decimals: int | None = None) -> str:
    """A number in four digits, or in so many decimals; all digits of a whole one."""
    if value is None:
        return NOT_MEASURED
    if decimals is not None:
        return f"{value:.{decimals}f}"
    if isinstance(value, int) or abs(value) == math.inf or value != value:
        return f"{value:,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _share(value: float | None) -> str:
    """`95.3 %`; what would be rounded to none or all, without being it, keeps its distance."""
    if value is None:
        return NOT_MEASURED
    if 0 < value < 0.0005:
        return "< 0.1 %"
    return "> 99.9 %" if 0.9995 <= value < 1 else f"{100 * value:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _one_line(value: Any) -> str:
    """Text without line ends, control, direction and surrogate characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())


def _code(value: Any) -> str:
    """Markdown that shows a text as it is, on one line."""
    text = _one_line(value)
    if not text:
        return "` `"
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([re.sub(r"\\*\|", r"\\|", cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# The curves: panels of 450 x 200, two in a row, in an SVG without scripts, fonts or anything from outside.

_WIDTH, _PANEL, _TOP, _FOOT = 900, 200, 48, 14
_LEFT, _PLOT_WIDTH, _PLOT_HEIGHT, _HEADING = 62, 360, 130, 26
_MOST_DOTS = 60

_STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #59636e; }
.back { fill: #ffffff; } .name { fill: #1f2328; font-weight: 600; font-size: 13px; }
.grid { stroke: #e4e8ed; } .axis { stroke: #9aa3ad; }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
.line.train { stroke: #1f6feb; } .dot.train, .key.train { fill: #1f6feb; }
.line.held { stroke: #bc4c00; } .dot.held, .key.held { fill: #bc4c00; }
@media (prefers-color-scheme: dark) {
text { fill: #9aa4af; } .back { fill: #0d1117; } .name { fill: #e6edf3; }
.grid { stroke: #262c34; } .axis { stroke: #5b6570; }
.line.train { stroke: #6cb0ff; } .dot.train, .key.train { fill: #6cb0ff; }
.line.held { stroke: #ffa15c; } .dot.held, .key.held { fill: #ffa15c; }
}
"""

Point = tuple[float, float | None]


@dataclass(frozen=True)
class _Series:
    """Values over steps. `look` is `train` for what is known of every step, `held` for what evaluations measured; a value
    that is no finite number is None and breaks the line."""

    name: str
    look: str
    points: Sequence[Point]

    @property
    def values(self) -> list[float]:
        return [value for _, value in self.points if value is not None]


@dataclass(frozen=True)
class _Panel:
    """Series that share an axis, which shows the values in `holds` whatever was measured."""

    name: str
    series: Sequence[_Series]
    holds: tuple[float, ...] = ()


def curves(metrics: Sequence[Mapping[str, Any]], eos: Mapping[str, Any]) -> str:
    """The course of a stage as one SVG, 900 pixels wide: loss, reward margin and accuracy (dpo), P(EOS), stop rate,
    learning rate. `metrics` are the lines of metrics.jsonl; values that are not finite are gaps."""
    panels = list(_panels(metrics, eos))
    last = max([point[0] for panel in panels for each in panel.series for point in each.points], default=0.0)
    last = max(1.0, last)
    height = _TOP + _PANEL * math.ceil(len(panels) / 2) + _FOOT
    stage = _xml(eos.get("stage") or "")
    count = sum(1 for line in metrics if "loss" in line)
    averaged = math.ceil(count / _PLOT_WIDTH)
    note = f"; a point of a line is the mean of {averaged} steps" if averaged > 1 else ""
    told = " ".join(_told(panel) for panel in panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'role="img" aria-labelledby="title desc">',
        f'<title id="title">Curves of the stage {stage}</title>',
        f'<desc id="desc">Small charts over {_count(count, "optimiser step")}{note}. {told}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="back" width="{_WIDTH}" height="{height}"/>',
        f'<text class="name" x="16" y="26">Stage {stage}</text>',
        f'<text x="{_WIDTH - 16}" y="26" text-anchor="end">{_count(count, "step")}; figures are the last values{note}</text>',
        *(_drawn(panel, number, last) for number, panel in enumerate(panels)),
        *(
            f'<text x="{left + _LEFT + _PLOT_WIDTH / 2:.0f}" y="{height - 14}" text-anchor="middle">optimiser step</text>'
            for left in (0, _WIDTH // 2)
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _panels(metrics: Sequence[Mapping[str, Any]], eos: Mapping[str, Any]) -> Iterator[_Panel]:
    def both(key: str) -> list[_Series]:
        return [
            _Series("train", "train", _column(metrics, key)),
            _Series("held out", "held", _column(metrics, f"eval_{key}")),
        ]

    measured = [{"step": 0, **(eos.get("before") or {})}, *(eos.get("history") or [])]
    yield _Panel("Loss", both("loss"))
    if any("rewards/margins" in line for line in metrics):
        yield _Panel("Reward margin", both("rewards/margins"), (0.0,))
        yield _Panel("Reward accuracy", both("rewards/accuracies"), (0.0, 1.0))
    yield _Panel("P(EOS) at the end of answers", [_Series("held out", "held", _column(measured, "p_eos"))], (0.0, 1.0))
    yield _Panel("Stop rate of generations", [_Series("held out", "held", _column(measured, "stop_rate"))], (0.0, 1.0))
    yield _Panel("Learning rate", [_Series("train", "train", _column(metrics, "learning_rate"))], (0.0,))


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    points = []
    for line in lines:
        step = _number(line.get("step"))
        if key in line and step is not None and step >= 0:
            points.append((step, _number(line[key])))
    return points


def _number(value: Any) -> float | None:
    """A number that can be drawn: finite, and of a size that sums and differences stay finite with."""
    if not isinstance(value, (int, float)) or not abs(value) <= 1e100:
        return None
    return float(value) if abs(value) >= 1e-100 else 0.0


def _told(panel: _Panel) -> str:
    """A panel in a sentence, for those who do not see it."""
    found = [
        f"{each.name} from {_figure(each.values[0])} to {_figure(each.values[-1])}"
        for each in panel.series
        if each.values
    ]
    return f"{panel.name}: {', '.join(found) or NOT_MEASURED}."


def _drawn(panel: _Panel, number: int, last: float) -> str:
    left, top = _LEFT + (number % 2) * _WIDTH // 2, _TOP + (number // 2) * _PANEL
    upper, right = top + _HEADING, left + _PLOT_WIDTH
    lower = upper + _PLOT_HEIGHT
    parts = ["<g>", f'<text class="name" x="{left}" y="{top + 12}">{panel.name}</text>']
    shown = [(each, _runs(each.points, _PLOT_WIDTH)) for each in panel.series if each.values]
    if not shown:
        middle = f'x="{left + _PLOT_WIDTH // 2}" y="{upper + _PLOT_HEIGHT // 2}"'
        return "".join([*parts, f'<text {middle} text-anchor="middle">{NOT_MEASURED}</text></g>'])
    ys = [y for _, runs in shown for run in runs for _, y in run] + list(panel.holds)
    ticks, step = _ticks(min(ys), max(ys))
    low, span = ticks[0], ticks[-1] - ticks[0]

    def place(x: float, y: float) -> tuple[str, str]:
        across, up = left + _PLOT_WIDTH * x / last, lower - _PLOT_HEIGHT * (y - low) / span
        return f"{across:.1f}", f"{up:.1f}"

    for tick in ticks:
        _, y = place(0, tick)
        parts.append(f'<path class="grid" d="M{left} {y}H{right}"/>')
        parts.append(
            f'<text x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{_label(tick, step, ticks)}</text>'
        )
    parts.append(f'<path class="axis" d="M{left} {lower}H{right}"/>')
    for tick in _whole_ticks(last):
        x, _ = place(tick, low)
        parts.append(f'<path class="axis" d="M{x} {lower}v4"/>')
        parts.append(f'<text x="{x}" y="{lower + 18}" text-anchor="middle">{_label(tick, 1, [last])}</text>')
    for each, runs in shown:
        parts += _marks(each, [[place(*point) for point in run] for run in runs])
    keys = [f'<tspan class="key {each.look}">{each.name} {_figure(each.values[-1])}</tspan>' for each, _ in shown]
    parts.append(f'<text x="{right}" y="{top + 12}" text-anchor="end">{" &#160; ".join(keys)}</text></g>')
    return "".join(parts)


def _marks(series: _Series, runs: Sequence[Sequence[tuple[str, str]]]) -> list[str]:
    """Lines through the points, and dots on measurements that are few and on points without a neighbour."""
    few = series.look == "held" and sum(map(len, runs)) <= _MOST_DOTS
    lines = ["M" + "L".join(f"{x} {y}" for x, y in run) for run in runs if len(run) > 1]
    dots = [point for run in runs if few or len(run) == 1 for point in run]
    return [
        *([f'<path class="line {series.look}" d="{"".join(lines)}"/>'] if lines else []),
        *(f'<circle class="dot {series.look}" cx="{x}" cy="{y}" r="{3 if few else 2}"/>' for x, y in dots),
    ]


def _runs(points: Sequence[Point], most: int) -> list[list[tuple[float, float]]]:
    """At most `most` points, each the mean of as many neighbours as that takes, in runs that end at gaps."""
    size = max(1, math.ceil(len(points) / most))
    runs: list[list[tuple[float, float]]] = [[]]
    for start in range(0, len(points), size):
        found = [(step, value) for step, value in points[start : start + size] if value is not None]
        if found:
            runs[-1].append((sum(x for x, _ in found) / len(found), sum(y for _, y in found) / len(found)))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _ticks(low: float, high: float) -> tuple[list[float], float]:
    """A few round numbers around a range, and their distance."""
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        room = abs(low) / 10 or 1.0
        low, high = low - room, high + room
    step = _round_step((high - low) / 4)
    return [number * step for number in range(math.floor(low / step), math.ceil(high / step) + 1)], step


def _whole_ticks(last: float) -> list[float]:
    step = max(1.0, _round_step(last / 5))
    return [number * step for number in range(math.floor(last / step) + 1)]


def _round_step(wanted: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below a number."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(digit * power for digit in (1, 2, 5, 10, 20) if digit * power >= wanted * (1 - 1e-9))


def _label(tick: float, step: float, ticks: Sequence[float]) -> str:
    """A tick with the digits that tell it from its neighbours."""
    most = max(map(abs, ticks))
    if tick == 0 or 1e-3 <= most < 1e5:
        decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if tick else 0
        return f"{tick:,.{decimals}f}"
    digits = max(0, math.floor(math.log10(abs(tick)) + 1e-9) - math.floor(math.log10(step) + 1e-9))
    mantissa, _, exponent = f"{tick:.{min(digits, 16)}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _xml(text: Any) -> str:
    return escape(_one_line(text))
