"""Runs on the Hub: a repository of models with a branch for each stage, against our stand-in."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml
from hub.clients import built, pair, process
from hub.loopback import LoopbackHub, Repo
from test_train_report import a_manifest, a_run, an_eos, some_metrics

from prefmix.errors import HubError, ModelError, PrefmixError
from prefmix.publish import push, push_run

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "someone/model"
BRANCHES = ["dpo-v0-adapter", "dpo-v0", "adapter", "main"]
TOKENIZER = {"tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}"}


def put(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def stage(folder: Path, name: str, digest: str | None = None, merged: bool = True, **changes: Any) -> Path:
    """A finished stage with stand-ins for its weights."""
    run = a_run(stage=name, adapter_sha256=f"{name} weights", **changes)
    manifest = a_manifest()
    if digest:
        run["mixture"]["digest"] = manifest["digest"] = digest
    records = {"run.json": run, "eos.json": an_eos(stage=name), "mixture.json": manifest}
    put(folder / name, {file: json.dumps(data) for file, data in records.items()})
    lines = "".join(json.dumps(line) + "\n" for line in some_metrics(3))
    put(folder / name, {"metrics.jsonl": lines, "recipe.toml": 'name = "small"\n', "curves.svg": "<svg/>"})
    adapter = {"adapter_config.json": "{}", "adapter_model.safetensors": f"adapter of {name}", "README.md": "PEFT's"}
    put(folder / name / "adapter", adapter | TOKENIZER)
    if merged:
        record = {"merge.json": json.dumps({"adapter_sha256": f"{name} weights"})}
        put(folder / name / "merged", {"config.json": "{}", "model.safetensors": f"{name} whole"} | TOKENIZER | record)
    return folder / name


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two stages, both merged."""
    stage(tmp_path / "small", "dpo")
    stage(tmp_path / "small", "eos", after_stage="dpo", method="sft")
    return tmp_path / "small"


def repo_of(hub: LoopbackHub) -> Repo:
    return hub.repos["model", REPO]


def files_on(hub: LoopbackHub, branch: str) -> dict[str, bytes]:
    repo = repo_of(hub)
    return repo.commits[repo.branches[branch]].files


def card_on(hub: LoopbackHub, branch: str) -> tuple[dict[str, Any], str]:
    head, _, text = files_on(hub, branch)["README.md"].decode().removeprefix("---\n").partition("---\n")
    return yaml.safe_load(head), text


def test_the_layout_is_that_of_the_reference_run_with_the_adapters_beside(hub: LoopbackHub, run: Path) -> None:
    pushed = push_run(run, REPO, tag="v1")
    assert [branch.name for branch in pushed.branches] == BRANCHES
    assert repo_of(hub).branches.keys() == set(BRANCHES)
    assert repo_of(hub).tags == {"v1": repo_of(hub).branches["main"]}
    for branch, weights, name in (("main", b"eos whole", "eos"), ("dpo-v0", b"dpo whole", "dpo")):
        there = files_on(hub, branch)
        assert there["model.safetensors"] == weights
        assert json.loads(there["run.json"])["stage"] == name
        assert {"eos.json", "metrics.jsonl", "recipe.toml", "curves.svg", "tokenizer.json"} <= there.keys()
        assert "adapter_model.safetensors" not in there
    for branch, weights in (("adapter", b"adapter of eos"), ("dpo-v0-adapter", b"adapter of dpo")):
        there = files_on(hub, branch)
        assert there["adapter_model.safetensors"] == weights
        assert "model.safetensors" not in there
        assert b"PEFT's" not in there["README.md"]


def test_each_card_is_taken_by_the_hub_and_says_how_its_own_branch_is_loaded(hub: LoopbackHub, run: Path) -> None:
    push_run(run, REPO)
    head, text = card_on(hub, "main")
    assert (head["base_model"], head["base_model_relation"], head["library_name"]) == (
        "teknium/OpenHermes-2.5-Mistral-7B", "finetune", "transformers")  # fmt: skip
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}", device_map="auto")' in text
    assert "PeftModel" not in text
    assert "merged into its base" in text
    assert ",," not in text
    assert "bd18d7aebc7e5fc9553e612a5a68fee46d8e23cbf46edd56cc6630fa928a56ee" in text
    assert "Over the stages of this run" in text
    assert f'from_pretrained("{REPO}", revision="dpo-v0", device_map' in card_on(hub, "dpo-v0")[1]
    head, text = card_on(hub, "adapter")
    assert (head["base_model_relation"], head["library_name"]) == ("adapter", "peft")
    assert f'PeftModel.from_pretrained(model, "{REPO}", revision="adapter")' in text
    assert "`adapter/`" not in text


def test_the_hub_refuses_a_card_that_is_none(hub: LoopbackHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    push_run(run, REPO)
    for branch in BRANCHES:
        text = files_on(hub, branch)["README.md"].decode()
        huggingface_hub.ModelCard(text).validate()
        for old, new, told in (
            ("base_model: teknium/", "base_model: of a/folder/", "base_model"),
            ("\nbase_model_relation: ", "\nbase_model_relation: un", "base_model_relation"),
            ("\npipeline_tag", "\nmodel-index: [{name: x, results: [{}]}]\npipeline_tag", "model.index"),
        ):
            assert old in text
            with pytest.raises(ValueError, match=told):
                huggingface_hub.ModelCard(text.replace(old, new, 1)).validate()


def test_a_run_that_is_there_makes_no_second_commit(hub: LoopbackHub, run: Path) -> None:
    first = push_run(run, REPO)
    history = dict(repo_of(hub).branches)
    again = push_run(run, REPO, tag="v1")
    assert [branch.is_new_commit for branch in first.branches] == [True] * 4
    assert [branch.is_new_commit for branch in again.branches] == [False] * 4
    assert repo_of(hub).branches == history
    assert again.is_new_tag
    assert not push_run(run, REPO, tag="v1").is_new_tag


def test_a_tag_on_another_model_is_not_moved_and_nothing_is_sent(hub: LoopbackHub, run: Path) -> None:
    push_run(run, REPO, tag="v1")
    before = dict(repo_of(hub).branches)
    stage(run, "eos", after_stage="dpo", method="sft", seed=7)
    for name in ("run.json", "merged/merge.json"):
        path = run / "eos" / name
        path.write_text(path.read_text().replace("eos weights", "other weights"))
    with pytest.raises(HubError, match="tag v1 with another model"):
        push_run(run, REPO, tag="v1")
    assert repo_of(hub).branches == before
    push_run(run, REPO, tag="v2")
    assert set(repo_of(hub).tags) == {"v1", "v2"}


@pytest.mark.parametrize("after", range(5))
@pytest.mark.parametrize(
    ("method", "pattern"), [("POST", "/commit/"), ("POST", "/branch/"), ("POST", "/tag/"), ("PUT", "/lfs/")]
)
def test_after_a_fault_a_second_push_completes_it(
    hub: LoopbackHub, run: Path, method: str, pattern: str, after: int
) -> None:
    hub.fail(method, pattern, status=500, times=99, after=after)
    try:
        push_run(run, REPO, tag="v1")
    except HubError:
        assert not repo_of(hub).tags
    hub.faults.clear()
    push_run(run, REPO, tag="v1")
    assert files_on(hub, "main")["model.safetensors"] == b"eos whole"
    assert files_on(hub, "adapter")["adapter_model.safetensors"] == b"adapter of eos"
    assert repo_of(hub).tags == {"v1": repo_of(hub).branches["main"]}
    for branch, commit in repo_of(hub).branches.items():
        weights = {"model.safetensors", "adapter_model.safetensors"} & repo_of(hub).commits[commit].files.keys()
        assert len(weights) == 1, branch


def test_files_of_the_model_before_go(hub: LoopbackHub, run: Path) -> None:
    put(run / "eos" / "merged", {"model-00002-of-00002.safetensors": "more"})
    push_run(run, REPO)
    (run / "eos" / "merged" / "model-00002-of-00002.safetensors").unlink()
    pushed = push_run(run, REPO)
    assert pushed.branches[-1].removed == ("model-00002-of-00002.safetensors",)
    assert "model-00002-of-00002.safetensors" not in files_on(hub, "main")


def test_adapters_alone_take_the_places_of_merged_weights(hub: LoopbackHub, tmp_path: Path) -> None:
    stage(tmp_path / "small", "dpo", merged=False)
    with pytest.raises(ModelError, match=r"not merged as it is now: run `prefmix merge .*dpo`"):
        push_run(tmp_path / "small", REPO)
    pushed = push_run(tmp_path / "small", REPO, adapters_only=True)
    assert [(branch.name, branch.form) for branch in pushed.branches] == [("main", "adapter")]
    assert f'PeftModel.from_pretrained(model, "{REPO}")' in card_on(hub, "main")[1]


def test_a_merge_of_another_adapter_is_refused(hub: LoopbackHub, run: Path) -> None:
    put(run / "dpo" / "merged", {"merge.json": json.dumps({"adapter_sha256": "of yesterday"})})
    with pytest.raises(ModelError, match="not merged as it is now"):
        push_run(run, REPO)
    assert ("model", REPO) not in hub.repos


def test_a_stage_can_be_pushed_alone_and_one_that_has_not_ended_cannot(hub: LoopbackHub, run: Path) -> None:
    assert [branch.name for branch in push_run(run / "dpo", REPO).branches] == ["adapter", "main"]
    assert files_on(hub, "main")["model.safetensors"] == b"dpo whole"
    path = run / "eos" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"finished": None}))
    with pytest.raises(ModelError, match="eos has not ended"):
        push_run(run, REPO)


def test_a_repository_that_holds_something_else_is_left_alone(hub: LoopbackHub, run: Path) -> None:
    hub.commit(REPO, {"model.safetensors": b"theirs", "config.json": b"{}", "extra.bin": b"x"}, repo_type="model")
    with pytest.raises(HubError, match=r"branch main that is no run of prefmix \(config\.json, extra"):
        push_run(run / "dpo", REPO, adapters_only=True)
    assert files_on(hub, "main")["extra.bin"] == b"x"
    assert repo_of(hub).branches.keys() == {"main"}


def test_the_card_names_the_mixture_on_the_hub_when_it_is_the_right_one(hub: LoopbackHub, tmp_path: Path) -> None:
    mixture = built(tmp_path, [pair(number) for number in range(9)])
    push(mixture, "someone/mix")
    stage(tmp_path / "small", "dpo", digest=mixture.digest)
    push_run(tmp_path / "small", REPO, data="someone/mix@v1")
    head, text = card_on(hub, "main")
    assert head["datasets"][0] == "someone/mix"
    assert "at the tag `v1`" in text
    assert mixture.digest in text
    stage(tmp_path / "other", "dpo")
    for data, told in (("someone/mix@v1", "another mixture"), ("someone/mix", "has no tag"), ("someone/mix@v9", "v9")):
        with pytest.raises(PrefmixError, match=told):
            push_run(tmp_path / "other", REPO, data=data)


def test_a_dry_run_sends_nothing(hub: LoopbackHub, run: Path) -> None:
    pushed = push_run(run, REPO, tag="v1", dry_run=True)
    assert [branch.commit for branch in pushed.branches] == [None] * 4
    assert all(branch.bytes > 0 for branch in pushed.branches)
    assert ("model", REPO) not in hub.repos


def test_the_commands_say_what_was_pushed_and_what_does_not_go_together(
    loopback_hub: LoopbackHub, run: Path, tmp_path: Path
) -> None:
    def prefmix(*words: str) -> Any:
        return process([sys.executable, "-m", "prefmix", *words], loopback_hub, tmp_path / "hf")

    dry = prefmix("push", str(run), REPO, "--dry-run")
    assert (dry.returncode, "nothing was sent" in dry.stdout) == (0, True), dry.stderr
    done = prefmix("push", str(run), REPO, "--tag", "v1")
    assert done.returncode == 0, done.stderr
    for words in ("pushed in", "dpo-v0-adapter", "main", "merged", "tag v1 is new"):
        assert words in done.stdout
    again = prefmix("push", str(run), REPO, "--tag", "v1", "--json")
    assert again.stderr == "", "the client's own advice stays off the screen"
    said = json.loads(again.stdout)
    assert [branch["is_new_commit"] for branch in said["branches"]] == [False] * 4
    for words, told in ((("--no-drops",), "is for mixtures"), (("--data", "x/y"), "has no tag")):
        assert told in prefmix("push", str(run), REPO, *words).stderr
    assert "are for runs" in prefmix("push", "nothing@v1", REPO, "--adapter").stderr
