"""The model card of a stage, made from run.json, eos.json, metrics.jsonl and the manifest of the mixture.

Whatever comes from data (names, licences, reasons, versions) is shown as code in Markdown, on one line: a name cannot
become a link, a heading or a key of the YAML.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from prefmix.card import STRICTNESS, UNKNOWN
from prefmix.chatml import ANSWER_HEADER, END, START
from prefmix.figures import NOT_MEASURED, code, counted, duration, figure, one_line, reasons, share, table

CURVES = "curves.svg"


@dataclass(frozen=True)
class Place:
    """Where a card lies: in a stage's folder, or in a revision of a repository on the Hub that has the stage's adapter,
    its adapter merged into the base, or its whole weights. `data` is where the mixture is, as `user/name@tag`."""

    form: Literal["stage", "adapter", "merged", "whole"] = "stage"
    repo: str = ""
    revision: str = "main"
    data: str | None = None


_HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def model_card(
    run: Mapping[str, Any],
    eos: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
    story: str = "",
    place: Place | None = None,
) -> str:
    """README.md of a stage: a model card as the Hub reads it, for a stage's folder unless `place` says where.

    `metrics` are the lines of metrics.jsonl, `manifest` is mixture.json. `story` is the table of the EOS over the stages
    of the run (`run_table`), for a stage that goes on from another one.
    """
    place = place or Place()
    mixture, method = run["mixture"], run["method"].upper()
    sections = [
        f"---\n{yaml.safe_dump(_head(run, manifest, place), sort_keys=False, allow_unicode=True, width=math.inf)}---",
        f"# {code(mixture['name'])}, stage {code(run['stage'])}: {method}",
        _what_it_is(run, eos, place),
        "## Prompt format",
        *_prompt_format(run, place),
        "## Does it end its turn?",
        *_eos(run, eos),
        *(["Over the stages of this run:", story] if story else []),
        "## Training data",
        *_training_data(run, manifest, place),
        "## Hyper-parameters",
        table(["setting", "value"], [[code(key), code(value)] for key, value in _flat(run["hyperparameters"])]),
        "## Training",
        table(["what", "value"], list(_training(run, metrics))),
        f"![Loss, EOS and learning rate over the steps of this stage]({CURVES})",
        "## Versions",
        table(["package", "version"], [[code(name), code(number)] for name, number in run["versions"].items()]),
        "## How to reproduce it",
        *_how_to_reproduce(run, place),
        "## Limits",
        *_limits(run, eos, manifest, place),
    ]
    return "\n\n".join(sections) + "\n"


def _head(run: Mapping[str, Any], manifest: Mapping[str, Any], place: Place) -> dict[str, Any]:
    settings = run["hyperparameters"]
    lora, nf4 = settings["adapter"] == "lora", settings["quantization"] == "nf4"
    head: dict[str, Any] = {}
    if _on_hub(run["base"]):  # the Hub takes no other names: a folder is named in the text only
        head["base_model"] = run["base"]["name"]
    peft = lora and place.form in ("stage", "adapter")
    head["base_model_relation"] = "adapter" if peft else "finetune"
    head["library_name"] = "peft" if peft else "transformers"
    head["pipeline_tag"] = "text-generation"
    licence = one_line(manifest["license"])
    if licence in (*STRICTNESS, UNKNOWN):
        head["license"] = licence
    else:
        head |= {"license": "other", "license_name": licence}
    sources = [place.data.partition("@")[0]] if place.data else []
    sources += [entry.get("hub") or "" for entry in manifest["sources"].values()]
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


def _what_it_is(run: Mapping[str, Any], eos: Mapping[str, Any], place: Place) -> str:
    settings, mixture = run["hyperparameters"], run["mixture"]
    if settings["adapter"] == "lora":
        kind = "A qLoRA adapter" if settings["quantization"] == "nf4" else "A LoRA adapter"
        made = {
            "stage": f"{kind} (in `adapter/`) for {_base(run['base'])}",
            "adapter": f"{kind} for {_base(run['base'])}",
        }.get(place.form, f"{kind}, merged into its base {_base(run['base'])} (in bf16)")
    else:
        here = " (in `adapter/`)" if place.form == "stage" else ""
        made = f"A model{here}, all weights of which were trained, from {_base(run['base'])}"
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


def _prompt_format(run: Mapping[str, Any], place: Place) -> list[str]:
    example = (
        f"{START}system\nYou are a helpful assistant.{END}\n{START}user\nWho wrote Faust?{END}\n"
        f"{ANSWER_HEADER}Goethe.{END}"
    )
    code_to_load = _code_to_load(run, place)
    return [
        f"ChatML; the system turn may be left out. The model's answer ends on `{END}`, which is the tokenizer's EOS.",
        f"```\n{example}\n```",
        f"The tokenizer{' in `adapter/`' if place.form == 'stage' else ''} has this as its chat template. With transformers, "
        f"accelerate{' and PEFT' if 'PeftModel' in code_to_load else ''}"
        f"{', in the folder of this card' if place.form == 'stage' else ''}:",
        f"```python\n{code_to_load}\n```",
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


def _code_to_load(run: Mapping[str, Any], place: Place) -> str:
    """A program that runs in the stage's folder, or anywhere when the weights are on the Hub."""
    base = run["base"]
    own = '"adapter"' if place.form == "stage" else _address(place.repo, place.revision)
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({own})",
    ]
    if run["hyperparameters"]["adapter"] == "lora" and place.form in ("stage", "adapter"):
        lines.insert(0, "from peft import PeftModel")
        if not _on_hub(base):
            lines.append("# The base is a folder, named as in the recipe.")
        address = _address(base["name"], base["revision"] if _on_hub(base) else "main")
        lines.append(f'model = AutoModelForCausalLM.from_pretrained({address}, device_map="auto")')
        if run["tokenizer"]["added"]:
            lines.append("if len(tokenizer) > model.get_input_embeddings().num_embeddings:")
            lines.append("    model.resize_token_embeddings(len(tokenizer))  # ChatML's tokens were added")
        lines.append(f"model = PeftModel.from_pretrained(model, {own})")
    else:
        lines.append(f'model = AutoModelForCausalLM.from_pretrained({own}, device_map="auto")')
    return "\n".join(lines) + "\n" + _GENERATE


def _address(name: str, revision: str) -> str:
    """Arguments of `from_pretrained`."""
    return _literal(name) + ("" if revision == "main" else f", revision={_literal(revision)}")


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


def _training_data(run: Mapping[str, Any], manifest: Mapping[str, Any], place: Place) -> list[str]:
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
    where = ""
    if place.data:
        repo, _, tag = place.data.partition("@")
        where = (
            f" It is on the Hub as [{repo}](https://huggingface.co/datasets/{repo}/tree/{tag}) at the tag {code(tag)}."
        )
    return [
        f"The mixture {code(_reference(run['mixture']))}, digest {code(run['mixture']['digest'])}, made from the recipe "
        f"with the digest {code(run['recipe_digest'])}. This stage read its `{subset}` subset: {counted(run['rows'], 'row')}{of}.{where}",
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
        elif value is not None and value != []:
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


def _how_to_reproduce(run: Mapping[str, Any], place: Place) -> list[str]:
    first = " The stages before it run first." if run.get("after_stage") else ""
    return [
        "```\nprefmix build recipe.toml\nprefmix train recipe.toml\n```",
        f"`recipe.toml` is in this {'folder' if place.form == 'stage' else 'repository'}, with every default spelled out. The "
        f"build is right when its digest is {code(run['mixture']['digest'])}. The seed is {code(run['seed'])}.{first}",
    ]


def _limits(run: Mapping[str, Any], eos: Mapping[str, Any], manifest: Mapping[str, Any], place: Place) -> list[str]:
    limits = [
        "What the base does wrong, this model may do as well. No benchmark, and nothing about safety, was measured here.",
        "The licence above is that of the training data; the base has its own, which holds too.",
        f"It knows ChatML and nothing else: without the template, or with a generation that does not stop at `{END}`, the "
        "figures above do not hold.",
    ]
    if run["hyperparameters"]["quantization"] == "nf4" and place.form == "merged":
        limits.append(
            "It was trained on the base in NF4. The adapter was merged into those rounded weights, and the sum was rounded to "
            "bf16: answers may differ a little from those of base and adapter."
        )
    elif run["hyperparameters"]["quantization"] == "nf4":
        limits.append(
            "The adapter was trained on the base in NF4. On the base in full precision answers differ a little."
        )
    if eos.get("split") == "train":
        limits.append("The mixture has no test split: the EOS was measured on rows that were also trained on.")
    if not manifest.get("contamination"):
        limits.append("Do not report a benchmark without searching the training data for it first.")
    return ["\n".join(f"- {limit}" for limit in limits)]
