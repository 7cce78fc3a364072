"""Mixtures on the Hub and back, against our stand-in (hub/loopback.py) with the real clients.

In this process files go over LFS; what runs over Xet, and `datasets`, is in test_cli_hub.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub.clients import built, pair
from hub.loopback import LoopbackHub, Repo
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from prefmix import card
from prefmix import hub as transport
from prefmix.digest import SplitDigest, mixture_digest
from prefmix.errors import HubError, MixtureError, UsageError
from prefmix.mixture import Mixture, columns, digested, write_shard
from prefmix.publish import open_mixture, pull, push, to_hub
from prefmix.publish.shards import write_arrow, write_parquet
from prefmix.store import Store

#: huggingface_hub's own, where it sends a file over LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "someone/mix"
ROWS = [pair(number) for number in range(40)]
TIE = pair(99, score=1.0)
SHARD = "preference/train-00000-of-00001.parquet"
SPLITS = {"splits": "test = 0.2"}


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    return built(tmp_path, [*ROWS, TIE], **SPLITS)


def repo_of(hub: LoopbackHub) -> Repo:
    return hub.repos["dataset", REPO]


def versions_pushed(hub: LoopbackHub) -> list[str]:
    """The digests of the commits on main that have a mixture, the newest first; a tag is only ever on one of them."""
    repo = repo_of(hub)
    history = repo.history(repo.branches["main"])
    found = [repo.commits[commit].files.get("mixture.json") for commit in history]
    assert set(repo.tags.values()) <= {commit for commit, manifest in zip(history, found, strict=True) if manifest}
    return [json.loads(manifest)["digest"] for manifest in found if manifest]


# There and back


def test_what_arrives_is_what_left(hub: LoopbackHub, mixture: Mixture, tmp_path: Path) -> None:
    pushed = push(mixture, REPO)
    assert (pushed.tag, pushed.is_new_commit, pushed.is_new_tag) == ("v1", True, True)
    pulled = pull("someone/mix@v1", tmp_path / "other")
    assert (str(pulled), pulled.digest, pulled.build, pulled.is_new) == ("mix@v1", mixture.digest, mixture.build, True)
    pulled.verify()
    for split in ("train", "test"):
        assert pulled.scan("preference", split).collect().equals(mixture.scan("preference", split).collect())
    assert pulled.drops.collect().equals(mixture.drops.collect())
    assert pulled.drops.collect()["reason"].to_list() == ["filter/tie"]
    assert pulled.changes.collect().equals(mixture.changes.collect())
    same = ("sources", "funnel", "audit", "recipe_digest", "fingerprints", "license", "seed", "tools")
    assert {key: pulled.manifest[key] for key in same} == {key: mixture.manifest[key] for key in same}
    origin = {"repo": REPO, "revision": "v1", "commit": pushed.commit, "version": "v1"}
    assert pulled.manifest["hub"] == origin
    assert Store(tmp_path / "other").find("mix").build == mixture.build


def test_messages_and_token_counts_survive_too(hub: LoopbackHub, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    (tmp_path / "sources" / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(tmp_path / "sources" / "tokenizer" / "tokenizer.json"))
    mixture = built(tmp_path, ROWS, format='layout = "messages"\ntokenizer = "tokenizer"')
    push(mixture, REPO)
    pulled = pull("someone/mix@v1", tmp_path / "other")
    assert (pulled.digest, pulled.manifest["subsets"]["preference"]["train"]["tokens"]) == (
        mixture.digest,
        mixture.manifest["subsets"]["preference"]["train"]["tokens"],
    )
    rows = pulled.dataset_dict("preference")["train"]
    assert rows.features == mixture.dataset_dict("preference")["train"].features
    assert rows[0]["chosen"][0]["role"] == "assistant"
    assert b"tokens a row" in repo_of(hub).commits[repo_of(hub).tags["v1"]].files["README.md"]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SCORES = st.none() | st.floats(allow_nan=True, width=64)


@settings(max_examples=25)
@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS, SCORES), min_size=1, max_size=30),
    layout=st.sampled_from(["text", "messages"]),
    with_tokens=st.booleans(),
)
def test_any_rows_have_the_same_digest_as_arrow_as_parquet_and_as_arrow_again(
    tmp_path_factory: pytest.TempPathFactory, rows: list, layout: str, with_tokens: bool
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    schema = columns("preference", layout, with_tokens)
    as_value = (lambda text: text) if layout == "text" else (lambda text: [{"role": "user", "content": text}])
    table = [
        {"id": "0" * 32, "source": a, "prompt": as_value(a), "chosen": as_value(b), "rejected": as_value(a + b)}
        | {"chosen_score": score, "rejected_score": None}
        | dict.fromkeys(("prompt_tokens", "chosen_tokens", "rejected_tokens"), len(b))
        for a, b, score in rows
    ]
    (folder / "preference").mkdir()
    before = SplitDigest(schema)
    batch = pa.RecordBatch.from_pylist(table, schema=schema)
    with ThreadPoolExecutor(1) as hasher:
        shard = "preference/train-00000-of-00001.arrow"
        entry = write_shard(folder / shard, shard, schema, digested([batch], before, hasher))
    parquet = folder / "train.parquet"
    write_parquet(folder / entry["path"], parquet, lambda rows: None)
    path = "preference/train-00000-of-00001.parquet"
    entries, after, found = write_arrow({path: parquet}, folder, "preference", lambda rows: None)
    assert found.equals(schema, check_metadata=True)
    digests = [mixture_digest({"preference": schema}, {"preference": {"train": each}}) for each in (before, after)]
    assert digests[0] == digests[1]
    assert entries[0]["path"] == entry["path"]


def test_the_parquet_files_have_a_page_index_and_the_features_and_are_the_same_each_time(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    arrow = mixture.folder / mixture.manifest["subsets"]["preference"]["train"]["files"][0]["path"]
    entries = [write_parquet(arrow, tmp_path / f"{number}.parquet", lambda rows: None) for number in range(2)]
    assert entries[0] == entries[1]
    column = pq.read_metadata(tmp_path / "0.parquet").row_group(0).column(2)
    assert column.has_offset_index
    assert column.has_column_index
    assert b"huggingface" in pq.read_schema(tmp_path / "0.parquet").metadata


def test_a_label_that_is_taken_gives_way_to_the_next_one_and_a_free_one_stays(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    second = built(tmp_path, ROWS[:30])
    assert str(second) == "mix@v2"
    for each in (mixture, second):
        push(each, REPO)
    assert str(pull("hub:someone/mix@v2", tmp_path / "empty")) == "mix@v2"
    other = built(tmp_path, ROWS[:10], name="theirs")
    push(other, "someone/theirs")
    pulled = pull("hub:someone/theirs@v1", tmp_path / "store", name="mix")
    assert (str(pulled), pulled.manifest["hub"]["version"]) == ("mix@v3", "v1")


def test_pulling_what_is_there_adds_nothing_and_fetches_no_rows(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    push(mixture, REPO)
    assert not pull("hub:someone/mix@v1", tmp_path / "store").is_new
    assert pull("hub:someone/mix@v1", tmp_path / "other").is_new
    hub.requests.clear()
    again = pull("hub:someone/mix@v1", tmp_path / "other")
    assert (str(again), again.is_new) == ("mix@v1", False)
    assert not [path for _, path in hub.requests if "parquet" in path]
    assert list(Store(tmp_path / "other").versions("mix")) == ["v1"]


def test_a_file_that_got_lost_in_the_store_is_pulled_again(hub: LoopbackHub, mixture: Mixture, tmp_path: Path) -> None:
    push(mixture, REPO)
    pulled = pull("hub:someone/mix@v1", tmp_path / "other")
    (pulled.folder / pulled.manifest["subsets"]["preference"]["train"]["files"][0]["path"]).unlink()
    again = pull("hub:someone/mix@v1", tmp_path / "other")
    again.verify()
    assert (str(again), again.is_new) == ("mix@v1", True)


def test_what_is_public_is_pulled_without_a_token(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(mixture, REPO)
    monkeypatch.delenv("HF_TOKEN")
    assert pull("someone/mix@v1", tmp_path / "other").digest == mixture.digest


def test_a_reference_to_the_hub_opens_wherever_one_is_taken(hub: LoopbackHub, mixture: Mixture, tmp_path: Path) -> None:
    import prefmix

    push(mixture, REPO)
    assert prefmix.open_mixture("hub:someone/mix@v1", tmp_path / "other").digest == mixture.digest
    assert prefmix.open_mixture("hub:someone/mix", tmp_path / "other").digest == mixture.digest
    assert prefmix.open_mixture("mix@v1", tmp_path / "other").digest == mixture.digest
    with pytest.raises(UsageError, match="user/repo@v2"):
        open_mixture("hub:mix")
    with pytest.raises(UsageError, match="no name for a mixture"):
        pull("someone/mix@v1", name="../mix")


def test_a_pulled_mixture_can_be_pushed_on(hub: LoopbackHub, mixture: Mixture, tmp_path: Path) -> None:
    push(mixture, REPO)
    push(pull("someone/mix@v1", tmp_path / "other"), "someone/copy")
    again = pull("someone/copy@v1", tmp_path / "third")
    assert (again.digest, again.build) == (mixture.digest, mixture.build)
    assert again.manifest["hub"]["repo"] == "someone/copy"


def test_the_store_of_the_one_who_pushes_is_no_concern_of_others(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    push(mixture, REPO)
    repo = repo_of(hub)
    for path, data in repo.commits[repo.tags["v1"]].files.items():
        assert str(tmp_path).encode() not in data, path


def test_without_its_ledger_a_mixture_says_so_when_it_is_asked_for_it(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    push(mixture, REPO, drops=False)
    assert not [path for path in repo_of(hub).commits[repo_of(hub).tags["v1"]].files if path.startswith("drops/")]
    pulled = pull("someone/mix@v1", tmp_path / "other")
    pulled.verify()
    with pytest.raises(MixtureError, match=r"has no ledger .*pushed to the Hub without"):
        _ = pulled.drops


# One commit, one tag


def test_a_push_is_one_commit_on_the_head_and_then_the_tag(hub: LoopbackHub, mixture: Mixture) -> None:
    push(mixture, REPO, message="As it was read")
    repo = repo_of(hub)
    history = repo.history(repo.branches["main"])
    assert len(history) == 2
    assert repo.commits[history[0]].title == "As it was read"
    assert repo.tags == {"v1": history[0]}
    writes = [path.split(REPO)[-1] for method, path in hub.requests if method == "POST" and "preupload" not in path]
    assert [path for path in writes if path.startswith(("/commit", "/tag"))] == [
        "/commit/main",
        f"/tag/{history[0]}",
    ]


def test_the_same_content_makes_no_second_commit_and_a_missing_tag_is_made(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    first = push(mixture, REPO)
    again = push(mixture, REPO)
    assert (again.commit, again.files, again.is_new_commit, again.is_new_tag) == (first.commit, (), False, False)
    push(built(tmp_path, ROWS[:30]), REPO)
    del repo_of(hub).tags["v1"]
    hub.requests.clear()
    repaired = push(mixture, REPO)
    assert (repaired.commit, repaired.is_new_commit, repaired.is_new_tag) == (first.commit, False, True)
    assert len(versions_pushed(hub)) == 2
    assert not [path for method, path in hub.requests if method == "PUT"]
    assert push(mixture, REPO, tag="stable").commit == first.commit
    assert repo_of(hub).tags["stable"] == first.commit


def test_what_somebody_has_removed_since_is_not_tagged_but_pushed_again(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    hub.fail("POST", "/tag/", status=500)
    with pytest.raises(HubError):
        push(mixture, REPO)
    repo = repo_of(hub)
    history = repo.history(repo.branches["main"])
    repo.commits[history[0]].files.pop(SHARD)
    assert push(mixture, REPO).is_new_commit
    assert pull("someone/mix@v1", tmp_path / "other").digest == mixture.digest


def test_a_tag_on_other_content_is_not_moved(hub: LoopbackHub, mixture: Mixture, tmp_path: Path) -> None:
    push(mixture, REPO)
    second = built(tmp_path, ROWS[:30])
    for dry_run in (True, False):
        with pytest.raises(HubError, match=r"has a tag v1 with other content .*Give another --tag"):
            push(second, REPO, tag="v1", dry_run=dry_run)
    assert len(versions_pushed(hub)) == 1
    with pytest.raises(HubError, match="has a branch main"):
        push(second, REPO, tag="main")
    assert push(second, REPO).tag == "v2"


def test_files_of_the_version_before_go_and_files_of_others_stay(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    push(mixture, REPO)
    repo = repo_of(hub)
    repo.add("main", {**repo.commits[repo.branches["main"]].files, "NOTES.md": b"mine"})
    pushed = push(built(tmp_path, ROWS[:30]), REPO)
    assert pushed.removed == ("preference/test-00000-of-00001.parquet",)
    files = repo.commits[repo.tags["v2"]].files
    assert files["NOTES.md"] == b"mine"
    listed = json.loads(files["mixture.json"])["subsets"]["preference"]
    assert [path for path in files if path.startswith("preference/")] == [
        file["path"] for entry in listed.values() for file in entry["files"]
    ]


def test_a_repository_that_holds_something_else_is_left_alone(hub: LoopbackHub, mixture: Mixture) -> None:
    hub.commit(REPO, {"README.md": b"# Mine", "data/train.parquet": b"rows"})
    with pytest.raises(MixtureError, match=r"holds something that is no mixture \(data/train.parquet\)"):
        push(mixture, REPO)
    hub.commit(REPO, {"README.md": b"# To be filled"})
    assert push(mixture, REPO).is_new_commit


def test_a_mixture_whose_files_are_damaged_is_not_pushed(hub: LoopbackHub, mixture: Mixture) -> None:
    (mixture.folder / "recipe.toml").write_text("name = 'other'\n")
    with pytest.raises(MixtureError, match=r"recipe.toml is not the file that was written"):
        push(mixture, REPO)
    assert ("dataset", REPO) not in hub.repos


def test_private_is_for_repositories_that_have_to_be_made(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(mixture, REPO, private=True)
    assert repo_of(hub).private
    assert pull("someone/mix@v1", tmp_path / "other").digest == mixture.digest
    push(mixture, REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"no such repository .*hf auth login"):
        pull("someone/mix@v1", tmp_path / "third")
    hub.commit("someone/open", {"README.md": b""})
    with pytest.raises(HubError, match="is public"):
        push(mixture, "someone/open", private=True)


def test_a_push_without_a_token_or_to_somebody_elses_name_says_how_to_log_in(
    hub: LoopbackHub, mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match=r"other/mix.*rights to create.*hf auth login"):
        push(mixture, "other/mix")
    monkeypatch.setenv("HF_TOKEN", "hf_thisisasecret")
    with pytest.raises(HubError, match="hf auth login") as caught:
        push(mixture, REPO)
    assert "hf_" not in str(caught.value).replace("huggingface", "")


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    planned = push(mixture, REPO, dry_run=True)
    assert (planned.commit, planned.dry_run, planned.bytes_there, planned.is_new_commit) == (None, True, 0, True)
    done = push(mixture, REPO)
    assert planned.files == done.files
    second = built(tmp_path, [*ROWS, pair(98, score=1.0)], **SPLITS)
    assert second.digest == mixture.digest  # the same rows, another ledger
    third = built(tmp_path, [*ROWS, TIE], splits="dev = 0.2")
    hub.requests.clear()
    planned = push(third, REPO, dry_run=True)
    assert not [path for method, path in hub.requests if method != "GET" and method != "HEAD"]
    assert len(versions_pushed(hub)) == 1
    there = {file.path for file in planned.files if file.is_there}
    assert there >= {"preference/train-00000-of-00001.parquet", "drops/drops.parquet"}
    assert 0 < planned.bytes_there < planned.bytes


def test_each_byte_is_sent_once(hub: LoopbackHub, mixture: Mixture, tmp_path: Path) -> None:
    pushed = push(mixture, REPO)
    large = sum(file.bytes for file in pushed.files if file.path.endswith(".parquet"))
    assert hub.uploaded == large
    push(mixture, REPO)
    push(built(tmp_path, [*ROWS, TIE], splits="dev = 0.2"), REPO)
    added = [path for method, path in hub.requests if method == "PUT"]
    assert len(added) == len(set(added))


# What can go wrong

FAULTS = {
    "the repository cannot be made": ("POST", "/repos/create", {"status": 500}),
    "the references cannot be read": ("GET", "/refs", {"status": 503}),
    "the modes of upload cannot be had": ("POST", "/preupload/", {"status": 502, "times": 99}),
    "the batch is refused": ("POST", "/objects/batch", {"status": 429, "times": 99}),
    "an upload is cut": ("PUT", "/lfs/", {"times": 99}),
    "an upload fails": ("PUT", "/lfs/", {"status": 503, "times": 99}),
    "the commit fails": ("POST", "/commit/", {"status": 503}),
    "the commit is cut": ("POST", "/commit/", {}),
    "the answer to the commit is lost": ("POST", "/commit/", {"lost": True}),
    "the tag fails": ("POST", "/tag/", {"status": 500}),
    "the answer to the tag is lost": ("POST", "/tag/", {"lost": True}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_after_a_fault_a_second_push_completes_it_and_makes_no_second_commit(
    name: str, hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    method, pattern, what = FAULTS[name]
    hub.fail(method, pattern, **what)
    with pytest.raises(HubError, match=REPO) as caught:
        push(mixture, REPO)
    assert hub.token not in str(caught.value)
    if "lost" not in what:
        assert not any(repo.tags for repo in hub.repos.values())
    hub.faults.clear()
    push(mixture, REPO)
    assert versions_pushed(hub) == [mixture.digest]
    assert list(repo_of(hub).tags) == ["v1"]
    assert len(hub.large) == len(set(hub.large))
    assert pull("someone/mix@v1", tmp_path / "other").digest == mixture.digest


def test_a_second_push_sends_only_what_is_missing(hub: LoopbackHub, mixture: Mixture) -> None:
    hub.fail("POST", "/commit/", status=503)
    with pytest.raises(HubError, match="run the push again, it goes on where it ended"):
        push(mixture, REPO)
    sent = hub.uploaded
    push(mixture, REPO)
    assert hub.uploaded == sent > 0


def test_two_who_push_at_once_do_not_overwrite_each_other(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = built(tmp_path, ROWS[:30])
    push(mixture, REPO)
    real = transport.commit

    def late(*arguments, **keys):
        repo = repo_of(hub)
        repo.add("main", {**repo.commits[repo.branches["main"]].files, "NOTES.md": b"theirs"})
        return real(*arguments, **keys)

    monkeypatch.setattr(transport, "commit", late)
    with pytest.raises(HubError, match="somebody else has pushed meanwhile: run the push again"):
        push(second, REPO)
    monkeypatch.setattr(transport, "commit", real)
    assert list(repo_of(hub).tags) == ["v1"]
    push(second, REPO)
    assert repo_of(hub).commits[repo_of(hub).tags["v2"]].files["NOTES.md"] == b"theirs"


def test_a_tag_that_somebody_else_makes_meanwhile_is_not_moved(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(mixture, REPO)
    second = built(tmp_path, ROWS[:30])
    real = transport.create_tag

    def late(repo: str, tag: str, commit: str) -> None:
        hub.tag(repo, tag, repo_of(hub).tags["v1"])
        real(repo, tag, commit)

    monkeypatch.setattr(transport, "create_tag", late)
    with pytest.raises(HubError, match="made the same tag meanwhile: run the push again"):
        push(second, REPO)
    monkeypatch.setattr(transport, "create_tag", real)
    with pytest.raises(HubError, match="has a tag v2 with other content"):
        push(second, REPO)
    assert len(versions_pushed(hub)) == 2
    assert push(second, REPO, tag="v2-again").is_new_commit is False


@pytest.fixture
def small_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits of at most one file."""
    monkeypatch.setattr(to_hub, "_send", partial(to_hub._send, at_most=1))


@pytest.mark.usefixtures("small_commits")
def test_more_than_a_commit_carries_goes_to_a_branch_first(hub: LoopbackHub, mixture: Mixture, tmp_path: Path) -> None:
    push(mixture, REPO)
    repo = repo_of(hub)
    assert len(repo.history(repo.branches["main"])) == 2
    assert list(repo.branches) == ["main"]
    assert len([path for _, path in hub.requests if "/commit/" in path]) == 5  # four large files, then main
    assert pull("someone/mix@v1", tmp_path / "other").digest == mixture.digest


@pytest.mark.usefixtures("small_commits")
@pytest.mark.parametrize("passed", range(6))
def test_a_push_in_parts_that_failed_anywhere_goes_on(
    passed: int, hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    hub.fail("POST", r"/(commit|tag)/", status=503, after=passed)
    with pytest.raises(HubError, match="run the push again"):
        push(mixture, REPO)
    assert repo_of(hub).tags == {}
    push(mixture, REPO)
    assert versions_pushed(hub) == [mixture.digest]
    assert list(repo_of(hub).branches) == ["main"]
    assert hub.uploaded == sum(map(len, hub.large.values()))
    assert pull("someone/mix@v1", tmp_path / "other").digest == mixture.digest


# What is refused on the way back


def spoil(hub: LoopbackHub, path: str, change) -> None:
    """Commits another content of one file, and moves the tag there as somebody with a token could."""
    repo = repo_of(hub)
    files = dict(repo.commits[repo.tags["v1"]].files)
    files[path] = change(files[path])
    if files[path] is None:
        del files[path]
    repo.tags["v1"] = repo.add("main", files)


def test_a_shard_with_other_bytes_is_refused_by_its_name(hub: LoopbackHub, mixture: Mixture, tmp_path: Path) -> None:
    push(mixture, REPO)
    spoil(hub, SHARD, lambda data: data[:-20] + b"x" + data[-19:])
    with pytest.raises(MixtureError, match=rf"someone/mix@v1: {SHARD} is not the file that was pushed"):
        pull("someone/mix@v1", tmp_path / "other")
    assert Store(tmp_path / "other").names() == []


def test_a_shard_that_is_missing_is_refused_by_its_name(hub: LoopbackHub, mixture: Mixture, tmp_path: Path) -> None:
    push(mixture, REPO)
    spoil(hub, SHARD, lambda data: None)
    with pytest.raises(MixtureError, match=rf"someone/mix@v1: {SHARD} is missing"):
        pull("someone/mix@v1", tmp_path / "other")


def test_a_ledger_with_other_bytes_is_refused_by_its_name(hub: LoopbackHub, mixture: Mixture, tmp_path: Path) -> None:
    push(mixture, REPO)
    spoil(hub, "drops/drops.parquet", lambda data: data + b"x")
    with pytest.raises(MixtureError, match=r"drops/drops.parquet is not the file"):
        pull("someone/mix@v1", tmp_path / "other")


def test_rows_that_are_not_those_of_the_digest_are_refused_though_the_manifest_was_made_to_fit(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    push(mixture, REPO)
    repo = repo_of(hub)
    table = pq.read_table(pa.BufferReader(repo.commits[repo.tags["v1"]].files[SHARD]))
    buffer = pa.BufferOutputStream()
    pq.write_table(table.slice(1), buffer)
    data = buffer.getvalue().to_pybytes()
    spoil(hub, SHARD, lambda _: data)

    def fitted(manifest: bytes) -> bytes:
        found = json.loads(manifest)
        found["subsets"]["preference"]["train"]["files"][0]["sha256"] = hashlib.sha256(data).hexdigest()
        return json.dumps(found).encode()

    spoil(hub, "mixture.json", fitted)
    with pytest.raises(MixtureError, match=rf"its rows are not those of digest {mixture.digest[:12]}"):
        pull("someone/mix@v1", tmp_path / "other")
    assert Store(tmp_path / "other").names() == []


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("name",), "../../elsewhere"),
        (("build",), "../../../../tmp"),
        (("digest",), None),
        (("subsets", "preference", "train", "files", 0, "path"), "../../train-00000-of-00001.parquet"),
        (("subsets", "preference", "train", "files", 0, "path"), "sft/train-00000-of-00001.parquet"),
        (("records", 0, "path"), "/etc/passwd"),
        (("subsets",), {}),
        (("subsets",), {"other": {}}),
        (("records",), []),
        (("version",), "../v1"),
        (("tools",), None),
        (("records", 0, "bytes"), "many"),
    ],
)
def test_a_manifest_that_names_places_outside_is_refused(
    keys: tuple, value: object, hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    push(mixture, REPO)

    def changed(manifest: bytes) -> bytes:
        found = json.loads(manifest)
        place = found
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        return json.dumps(found).encode()

    spoil(hub, "mixture.json", changed)
    with pytest.raises(MixtureError, match=r"its mixture.json is not one that `prefmix push` wrote"):
        pull("someone/mix@v1", tmp_path / "other")


def test_a_newer_format_and_no_mixture_at_all_are_told_apart(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    push(mixture, REPO)
    spoil(hub, "mixture.json", lambda manifest: manifest.replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(MixtureError, match="has format 2, this prefmix reads up to 1: upgrade"):
        pull("someone/mix@v1", tmp_path / "other")
    hub.commit("someone/pairs", {"README.md": b"# Pairs"})
    with pytest.raises(MixtureError, match="someone/pairs@main is no mixture that prefmix pushed"):
        pull("someone/pairs", tmp_path / "other")
    with pytest.raises(HubError, match='no tag "v9": it has v1'):
        pull("someone/mix@v9", tmp_path / "other")


def test_a_build_of_the_same_name_with_another_digest_does_not_pass_for_the_one_that_is_here(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    push(mixture, REPO)
    spoil(hub, "mixture.json", lambda manifest: manifest.replace(mixture.digest.encode(), b"0" * 64))
    with pytest.raises(MixtureError, match="has another digest: one of the two was tampered with"):
        pull("someone/mix@v1", tmp_path / "store")


def test_bytes_that_were_damaged_on_their_way_are_fetched_again(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    push(mixture, REPO)
    hub.fail("GET", SHARD, spoilt=True)
    assert pull("someone/mix@v1", tmp_path / "other").digest == mixture.digest


def test_bytes_that_stay_damaged_are_refused_and_do_not_stay_in_the_cache(
    hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    push(mixture, REPO)
    hub.fail("GET", SHARD, spoilt=True, times=2)
    with pytest.raises(MixtureError, match=rf"{SHARD} is not the file that was pushed"):
        pull("someone/mix@v1", tmp_path / "other")
    assert pull("someone/mix@v1", tmp_path / "other").digest == mixture.digest


@pytest.mark.parametrize("what", [{"status": 503, "times": 99}, {"times": 99}], ids=["503", "cut"])
def test_a_download_that_failed_is_completed_by_a_second_pull(
    what: dict, hub: LoopbackHub, mixture: Mixture, tmp_path: Path
) -> None:
    push(mixture, REPO)
    hub.fail("GET", SHARD, **what)
    with pytest.raises(HubError, match=REPO):
        pull("someone/mix@v1", tmp_path / "other")
    assert Store(tmp_path / "other").names() == []
    hub.faults.clear()
    assert pull("someone/mix@v1", tmp_path / "other").digest == mixture.digest


# Without the Hub


@pytest.fixture
def two_cached(hub: LoopbackHub, mixture: Mixture, tmp_path: Path) -> tuple[Mixture, Mixture]:
    """v1 and v2, pulled once each; v3 was pushed and never pulled."""
    versions = mixture, built(tmp_path, ROWS[:30])
    for each in (*versions, built(tmp_path, ROWS[:20])):
        push(each, REPO)
    for label in ("v1", "v2"):
        pull(f"someone/mix@{label}", tmp_path / "first")
    return versions


@pytest.mark.parametrize("how", ["offline", "down", "broken"])
def test_without_the_hub_a_tag_serves_its_own_version_or_none(
    how: str, hub: LoopbackHub, two_cached: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    elif how == "down":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    else:
        hub.fail("GET", "/api/", status=503, times=100)
    for label, wanted in zip(("v1", "v2"), two_cached, strict=True):
        pulled = pull(f"someone/mix@{label}", tmp_path / "second")
        assert (pulled.version, pulled.digest, pulled.is_new) == (label, wanted.digest, True)
    for revision in ("v3", "main", "v9"):
        with pytest.raises(HubError, match=rf'"{revision}" is no tag that was fetched before; fetched were: v1, v2'):
            pull(f"someone/mix@{revision}", tmp_path / "second")
    assert list(Store(tmp_path / "second").versions("mix")) == ["v1", "v2"]


def test_offline_nothing_is_pushed(hub: LoopbackHub, mixture: Mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="go online"):
        push(mixture, REPO)
    assert hub.requests == []


# The card


def test_the_card_is_one_that_the_hub_takes_and_its_check_refuses_others(
    hub: LoopbackHub, mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    push(mixture, REPO)
    text = repo_of(hub).commits[repo_of(hub).tags["v1"]].files["README.md"].decode()
    found = huggingface_hub.DatasetCard(text)
    found.validate()
    assert found.data.license == "mit"
    assert [config["config_name"] for config in found.data["configs"]] == ["preference"]
    with pytest.raises(ValueError, match="license"):
        huggingface_hub.DatasetCard(text.replace("license: mit", "license: none of them")).validate()
    huggingface_hub.DatasetCard((mixture.folder / "README.md").read_text()).validate()


def test_the_card_says_what_is_inside_and_what_was_done(hub: LoopbackHub, versions: Path) -> None:
    push(open_mixture("quickstart@v1", versions), REPO)
    text = repo_of(hub).commits[repo_of(hub).tags["v1"]].files["README.md"].decode()
    headings = re.findall("^## (.*)$", text, re.MULTILINE)
    assert headings == [
        "What is inside", "Sources", "From rows read to rows kept", "Known defects of the sources, and what was done",
        "Text of benchmarks", "Reported, not dropped", "How to load it", "How to build it again",
        "Intended use and limits",
    ]  # fmt: skip
    assert "| ultrafeedback | quickstart/ultrafeedback.jsonl |  | apache-2.0 | 114 | 97 | filter/tie 3," in text
    assert "The licence is the strictest of the sources: apache-2.0." in text
    assert "| equal ratings | `filter.min_margin = 0.0` | `filter/tie` | 3 | 0 |" in text
    assert "| text of benchmarks | `decontaminate.suites` | `decontaminate/<benchmark>` | 2 | 0 |" in text
    assert "| preference | chosen | characters | 129 | 278 | 368 |" in text
    assert "| pubquiz | 12 | 6 | 6 | 6 |" in text


def test_a_source_on_the_hub_has_what_is_known_of_it_and_an_unknown_one_nothing() -> None:
    entry = {"licence": "mit", "read": 2, "kept": 1, "dropped": {"filter/tie": 1}, "revision": "0" * 40}
    manifest = {
        "name": "mix", "digest": "d", "recipe_digest": "r", "license": "cc-by-4.0", "tools": {"prefmix": "0"},
        "subsets": {"preference": {"train": {"rows": 1, "tokens": None, "files": [{"path": "preference/train-0.arrow"}]}}},
        "sources": {
            "orca": {**entry, "format": "orca_dpo_pairs", "hub": "Intel/orca_dpo_pairs"},
            "mine": {**entry, "format": "orca_dpo_pairs", "hub": "me/mine"},
        },
        "funnel": [], "audit": {}, "contamination": {}, "tokenizer": None,
    }  # fmt: skip
    text = card.card(manifest)
    assert "### orca\n\n| defect |" in text
    assert "### mine" not in text
    assert "**orca_dpo_pairs**: For DPO and similar methods" in text
    assert "The recipe sets the licence to cc-by-4.0; the strictest of the sources is mit." in text
    assert "No benchmark was searched for" in text
