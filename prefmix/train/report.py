"""The model card of a stage (README.md), made from run.json, eos.json, metrics.jsonl and the manifest of the mixture, and
written with its curves (curves.py).

Whatever comes from data (names, licences, reasons, versions) is shown as code in Markdown, on one line, and is escaped in
the SVG: a name cannot become a link, a heading, a key of the YAML or an element. Neither half needs torch.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from prefmix.card import STRICTNESS, UNKNOWN
from prefmix.chatml import ANSWER_HEADER, END, START
from prefmix.errors import TrainError
from prefmix.train.curves import curves
from prefmix.train.figures import NOT_MEASURED, code, counted, duration, figure, one_line, reasons, share, table

CARD, CURVES = "README.md", "curves.svg"

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
                code(folder.name),
                f"{figure(before.get('p_eos'))} → {figure(after.get('p_eos'))}",
                f"{share(before.get('stop_rate'))} → {share(after.get('stop_rate'))}",
            ]
        )
    return table(["stage", "P(EOS), before → after", "stop rate, before → after"], rows)


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
        f"# {code(mixture['name'])}, stage {code(run['stage'])}: {method}",
        _what_it_is(run, eos),
        "## Prompt format",
        *_prompt_format(run),
        "## Does it end its turn?",
        *_eos(run, eos),
        *(["Over the stages of this run:", story] if story else []),
        "## Training data",
        *_training_data(run, manifest),
        "## Hyper-parameters",
        table(["setting", "value"], [[code(key), code(value)] for key, value in _flat(run["hyperparameters"])]),
        "## Training",
        table(["what", "value"], list(_training(run, metrics))),
        f"![Loss, EOS and learning rate over the steps of this stage]({CURVES})",
        "## Versions",
        table(["package", "version"], [[code(name), code(number)] for name, number in run["versions"].items()]),
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
    licence = one_line(manifest["license"])
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
        return f"{code(base['name'])}, a folder"
    return f"[{base['name']}](https://huggingface.co/{base['name']}) at {code(base['revision'][:12])}"


def _what_it_is(run: Mapping[str, Any], eos: Mapping[str, Any]) -> str:
    settings, mixture = run["hyperparameters"], run["mixture"]
    if settings["adapter"] == "lora":
        kind = "A qLoRA adapter" if settings["quantization"] == "nf4" else "A LoRA adapter"
        made = f"{kind} (in `adapter/`) for {_base(run['base'])}"
    else:
        made = f"A model (in `adapter/`), all weights of which were trained, from {_base(run['base'])}"
    how = (
        f"trained with direct preference optimisation (loss {code(_plain(settings.get('loss')))}) on"
        if run["method"] == "dpo"
        else "fine-tuned on the answers of"
    )
    ends = "Whether its answers end by themselves was not measured."
    if (rate := (eos.get("after") or {}).get("stop_rate")) is not None:
        first = share((eos.get("before") or {}).get("stop_rate"))
        ends = f"After the stage {share(rate)} of its answers ended by themselves (before it: {first})."
    goes_on = f" It goes on from the stage {code(run['after_stage'])}." if run.get("after_stage") else ""
    return (
        f"{made}, {how} {counted(run['rows'], 'row')} of the mixture {code(_reference(mixture))} in ChatML, by prefmix "
        f"{code(run['versions'].get('prefmix'))} with TRL.{goes_on} {ends}"
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
        ["P(EOS) where held-out answers end, mean", *(figure(each.get("p_eos")) for each in both)],
        ["log P(EOS), mean", *(figure(each.get("log_p_eos"), 3) for each in both)],
        ["stop rate", *(share(each.get("stop_rate")) for each in both)],
        ["stop rate, greedy", *(_stopped(each.get("greedy")) for each in both)],
        ["stop rate, sampled", *(_stopped(each.get("sampled")) for each in both)],
        [f"cut at {settings['max_new_tokens']:,} tokens", *(figure(each.get("cut")) for each in both)],
        ["generations (n)", *(figure(each.get("n")) for each in both)],
    ]
    wanted, rate = settings["min_stop_rate"], after.get("stop_rate")
    if rate is None:
        verdict = "**Not judged**: the stage was not measured at its end."
    elif rate >= wanted:
        verdict = (
            f"**Passed**: {share(rate)} of the generations ended by themselves, and {share(wanted)} are asked for."
        )
    else:
        verdict = f"**Not passed**: only {share(rate)} of the generations ended by themselves, and {share(wanted)} are asked for."
    held_out = "" if "rows" not in eos else f" ({counted(eos['rows'], 'row')} of the {code(eos['split'])} split)"
    return [
        f"{verdict} (`min_stop_rate`; a run is judged after its last stage.)",
        table(["", "before the stage", "after the stage"], rows),
        f"Measured on the same answers at every stage{held_out}: the probability of `{END}` where they end, and one greedy "
        "and one sampled generation from each of their prompts. A generation has stopped when it ends on "
        f"`{END}`; one that is cut at the bound has not.",
    ]


def _stopped(stops: Mapping[str, Any] | None) -> str:
    if not stops:
        return NOT_MEASURED
    return f"{share(stops['stopped'] / stops['n'] if stops['n'] else 0.0)} ({stops['stopped']:,} of {stops['n']:,})"


def _training_data(run: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    subset = run["hyperparameters"]["subset"]
    in_split = manifest["subsets"].get(subset, {}).get("train", {}).get("rows")
    of = "" if in_split is None else f", of {in_split:,} in its train split"
    rows = [
        [
            code(name),
            code(entry["kind"]),
            _source(entry),
            code(entry["licence"]),
            *(f"{entry[key]:,}" for key in ("read", "kept")),
            reasons(entry["dropped"]),
        ]
        for name, entry in manifest["sources"].items()
    ]
    return [
        f"The mixture {code(_reference(run['mixture']))}, digest {code(run['mixture']['digest'])}, made from the recipe "
        f"with the digest {code(run['recipe_digest'])}. This stage read its `{subset}` subset: {counted(run['rows'], 'row')}{of}.",
        table(["source", "subset", "from", "licence", "rows read", "kept", "dropped"], rows),
        f"The licence of the mixture is {code(manifest['license'])}.",
        *_decontaminated(manifest.get("contamination") or {}),
    ]


def _source(entry: Mapping[str, Any]) -> str:
    """Where a source came from. Files of one's own have no address that would mean something to others."""
    if not entry.get("hub"):
        return f"files in the format {code(entry['format'])}"
    revision = f" at {code(entry['revision'][:12])}" if entry.get("revision") else ""
    if not _HUB_NAME.fullmatch(entry["hub"]):
        return code(entry["hub"]) + revision
    return f"[{entry['hub']}](https://huggingface.co/datasets/{entry['hub']}){revision}"


def _decontaminated(report: Mapping[str, Any]) -> list[str]:
    if not report:
        return [
            "**Not decontaminated**: no benchmark was searched for in these rows. A score on one may come from having "
            "seen it."
        ]
    rows = [
        [code(name), *(f"{entry[key]:,}" for key in ("items", "touched", "rows", "dropped"))]
        for name, entry in report.items()
    ]
    return [
        "Decontaminated against:",
        table(["benchmark", "items", "items found", "rows that held them", "rows dropped for it"], rows),
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
    yield ["rows left out", reasons(run.get("left_out") or {})]
    yield ["rows with a shortened prompt", figure(run.get("shortened"))]
    yield ["steps", f"{run['steps']:,}"]
    yield ["epochs", figure(run.get("epochs"))]
    if not run.get("finished"):
        yield ["finished", "no"]
        return
    yield ["tokens", f"{run['tokens']:,}"]
    yield ["speed", f"{figure(run['pairs_per_s'])} {unit}/s, {figure(run['tokens_per_s'])} tokens/s"]
    if run.get("mfu") is not None:
        yield ["model FLOP utilisation", share(run["mfu"])]
    yield ["wall clock", duration(run["wall_s"])]
    yield ["peak memory", f"{run['peak_memory_bytes'] / 1e9:,.2f} GB ({run['peak_memory_bytes']:,} bytes)"]
    yield ["hardware", code(_hardware(run["hardware"]))]
    losses = run.get("losses") or {}
    yield ["loss, first step", figure(losses.get("first"))]
    yield ["loss, last step", figure(losses.get("last"))]
    last = next((line for line in reversed(metrics) if "eval_loss" in line), {})
    for name, key in _HELD_OUT.items():
        if key in last:
            yield [f"{name}, held-out rows", figure(last[key])]
    if run.get("adapter_sha256"):
        yield ["sha256 of the weights", code(run["adapter_sha256"])]


_HELD_OUT = {"loss": "eval_loss", "reward margin": "eval_rewards/margins", "reward accuracy": "eval_rewards/accuracies"}


def _hardware(hardware: Mapping[str, Any]) -> str:
    number, parts = hardware.get("processes", 1), [str(hardware["device"])]
    if "memory_bytes" in hardware:
        parts.append(f"{hardware['memory_bytes'] / 1e9:,.0f} GB")
    if "threads" in hardware:
        parts.append(counted(hardware["threads"], "thread"))
    return f"{number} x {', '.join(parts)}" if number > 1 else ", ".join(parts)


def _how_to_reproduce(run: Mapping[str, Any]) -> list[str]:
    first = " The stages before it run first." if run.get("after_stage") else ""
    return [
        "```\nprefmix build recipe.toml\nprefmix train recipe.toml\n```",
        "`recipe.toml` is in the mixture's folder; its `[train]` has to say what the table of hyper-parameters says. The "
        f"build is right when its digest is {code(run['mixture']['digest'])}. The seed is {code(run['seed'])}.{first}",
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
