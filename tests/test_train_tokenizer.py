"""Tokenizers of base models: which are taken, what is done to them, which are refused and what the refusal says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import smollm2_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from prefmix.chatml import render, render_prompt
from prefmix.errors import TrainError
from prefmix.schema import MESSAGES
from prefmix.train.tokenizer import CHAT_TEMPLATE, ChatTokenizer, load_tokenizer

CHATML = ("<|im_start|>", "<|im_end|>")
QUESTION, ANSWER = {"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> Path:
    return smollm2_tokenizer(tmp_path_factory.getbasetemp() / "smollm2-tokenizer")


@pytest.fixture(scope="module")
def smol_loaded(smol) -> ChatTokenizer:
    return load(smol)


def base(folder: Path, special: tuple[str, ...] = ("<unk>",), plain: tuple[str, ...] = (), **config: object) -> Path:
    """A small byte-level tokenizer as a base model has it: tokenizer.json and tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["user\nHello there", "assistant\nHello"], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    if bos := config.get("bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return saved(folder, tokenizer, **config)


def saved(folder: Path, tokenizer: Tokenizer, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def load(folder: Path, **options: bool) -> ChatTokenizer:
    return load_tokenizer(folder.name, "main", folder.parent, **options)


content = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(["\n\n x", " ", "", "a\n"])
message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]),
        "content": content.filter(lambda t: "<|" not in t),
    }
)


@settings(max_examples=60)
@given(st.lists(message, min_size=1, max_size=4))
def test_the_template_writes_what_the_mixture_holds(smol_loaded, messages):
    tokenizer = smol_loaded.tokenizer
    column = pl.DataFrame({"m": [messages]}, schema={"m": MESSAGES})
    whole, prompt = column.select(render(pl.col("m")).alias("w"), render_prompt(pl.col("m")).alias("p")).row(0)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == whole
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt


def test_the_template_opens_an_answer_without_any_turn_before_it(smol_loaded):
    (text,) = smol_loaded.tokenizer.apply_chat_template([[]], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>assistant\n"


def test_the_generation_markers_are_around_each_answer_and_its_end(smol_loaded):
    tokenizer = smol_loaded.tokenizer
    found = tokenizer.apply_chat_template(
        [QUESTION, ANSWER, QUESTION, ANSWER], return_assistant_tokens_mask=True, return_dict=True
    )
    trained = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(trained) == "Four.<|im_end|>" * 2


def test_smollm2_keeps_its_ids_and_loses_the_system_prompt_of_its_template(smol, smol_loaded):
    loaded = smol_loaded
    assert (loaded.start_id, loaded.end_id, loaded.added, loaded.commit) == (1, 2, (), None)
    assert loaded.tokenizer.eos_token_id == 2
    assert loaded.tokenizer.pad_token == "<|endoftext|>"
    assert "SmolLM" in (smol / "chat_template.jinja").read_text()
    assert "SmolLM" not in loaded.tokenizer.apply_chat_template([QUESTION], tokenize=False)
    assert loaded.notes == ("Its own chat template is replaced by plain ChatML, without a default system prompt.",)


@pytest.mark.parametrize("add_tokens", [False, True])
def test_what_is_saved_is_read_again_with_the_same_ids_digest_and_template(tmp_path, add_tokens):
    folder = base(tmp_path / "base", ("<unk>", *(() if add_tokens else CHATML)), unk_token="<unk>")
    first = load(folder, add_tokens=add_tokens)
    first.tokenizer.save_pretrained(tmp_path / "adapter")
    again = load(tmp_path / "adapter")
    assert (again.sha256, again.start_id, again.end_id) == (first.sha256, first.start_id, first.end_id)
    assert again.notes == ()
    stock = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert stock.chat_template == CHAT_TEMPLATE
    rendered = stock.apply_chat_template([QUESTION, ANSWER], return_dict=True)["input_ids"]
    assert rendered == first.tokenizer.apply_chat_template([QUESTION, ANSWER], return_dict=True)["input_ids"]
    assert (stock.eos_token, stock.pad_token) == ("<|im_end|>", "<unk>")


def test_the_digest_is_that_of_the_tokenizer_and_not_of_its_folder_or_template(smol, smol_loaded, tmp_path):
    copy = Path(shutil.copytree(smol, tmp_path / "copy"))
    (copy / "chat_template.jinja").unlink()
    assert load(copy).sha256 == smol_loaded.sha256
    assert load(copy).notes == ()
    (copy / "tokenizer.json").write_text(
        (copy / "tokenizer.json").read_text().replace('"special":true', '"special": true')
    )
    assert load(copy).sha256 == smol_loaded.sha256
    other = base(tmp_path / "other", ("<unk>", *CHATML))
    assert load(other).sha256 != smol_loaded.sha256


def test_limits_that_were_saved_with_a_tokenizer_do_not_cut_or_pad(tmp_path):
    folder = base(tmp_path / "base", ("<unk>", *CHATML))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64, pad_id=tokenizer.token_to_id("<unk>"), pad_token="<unk>")
    plain, limited = load(folder), load(saved(tmp_path / "limited", tokenizer))
    assert limited.sha256 == plain.sha256
    backend = limited.tokenizer.backend_tokenizer
    assert len(backend.encode("<|im_start|>user\n", add_special_tokens=False)) not in (2, 64)


def test_a_base_without_chatml_tokens_is_refused_until_they_may_be_added(tmp_path):
    folder = base(tmp_path / "base", unk_token="<unk>", eos_token="<unk>")
    with pytest.raises(
        TrainError, match=r"splits <\|im_end\|> and <\|im_start\|> into \d+ and \d+ ids.*`add_tokens = true`"
    ):
        load(folder)
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    loaded = load(folder, add_tokens=True)
    assert loaded.added == ("<|im_end|>", "<|im_start|>")
    assert (loaded.end_id, loaded.start_id) == (size, size + 1)  # as OpenHermes-2.5-Mistral-7B has them behind 32,000
    assert loaded.tokenizer.eos_token_id == loaded.end_id
    assert loaded.tokenizer.pad_token == "<unk>"
    assert loaded.notes == (
        "The end of a text was <unk>; it is <|im_end|> now.",
        "The padding was None; it is <unk> now.",
    )


def test_a_base_that_lacks_one_token_is_given_that_one(tmp_path):
    folder = base(tmp_path / "base", ("<unk>", "<|im_end|>"))
    assert load(folder, add_tokens=True).added == ("<|im_start|>",)


def test_tokens_that_the_model_has_no_embeddings_for_count_as_missing(tmp_path):
    folder = base(tmp_path / "base", ("<unk>", *CHATML))
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    (folder / "config.json").write_text(json.dumps({"vocab_size": size - 1}))
    with pytest.raises(TrainError, match=rf"has {size - 1} embeddings .* none for <\|im_end\|> \(id {size - 1}\)"):
        load(folder)
    assert load(folder, add_tokens=True).added == ("<|im_end|>",)
    (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": size}}))
    assert load(folder).added == ()


def test_added_tokens_that_are_not_special_become_so_with_a_note(tmp_path):
    folder = base(tmp_path / "base", ("<unk>", "<|im_end|>"), plain=("<|im_start|>",), eos_token="<|im_end|>")
    loaded = load(folder)
    assert loaded.notes[0] == "<|im_start|> was no special token and is one now."
    ids = loaded.tokenizer.encode("<|im_start|>user\nHello<|im_end|>", add_special_tokens=False)
    assert loaded.tokenizer.decode(ids, skip_special_tokens=True) == "user\nHello"
    assert loaded.added == ()


def test_a_chatml_token_that_only_counts_between_blanks_is_refused(tmp_path):
    folder = base(tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, single_word=True) for token in CHATML])
    with pytest.raises(TrainError, match="one id each inside a conversation"):
        load(saved(folder, tokenizer))


def test_another_end_of_text_gives_way_to_the_end_of_a_turn(tmp_path):
    folder = base(tmp_path / "base", ("<|endoftext|>", *CHATML), eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    loaded = load(folder)
    assert loaded.tokenizer.eos_token == "<|im_end|>"
    assert loaded.tokenizer.pad_token == "<|endoftext|>"
    assert loaded.notes == ("The end of a text was <|endoftext|>; it is <|im_end|> now.",)


@pytest.mark.parametrize(
    ("special", "config", "pad"),
    [
        (("<pad>", *CHATML), {"pad_token": "<pad>"}, "<pad>"),
        (("<s>", "<unk>", *CHATML), {"pad_token": "<|im_end|>", "unk_token": "<unk>"}, "<unk>"),
        (("<s>", "<x>", "<|endoftext|>", *CHATML), {"pad_token": "<|im_end|>"}, "<|endoftext|>"),
        (("<s>", "<x>", *CHATML), {"bos_token": "<s>"}, "<x>"),
    ],
)
def test_the_padding_is_never_the_end_of_a_turn(tmp_path, special, config, pad):
    assert load(base(tmp_path / "base", special, **config)).tokenizer.pad_token == pad


def test_padding_that_the_model_has_no_embedding_for_is_not_used(tmp_path):
    folder = base(tmp_path / "base", ("<unk>", *CHATML, "[PAD]"), pad_token="[PAD]")
    assert load(folder).tokenizer.pad_token == "[PAD]"
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    (folder / "config.json").write_text(json.dumps({"vocab_size": size - 1}))
    assert load(folder).tokenizer.pad_token == "<unk>"


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tmp_path):
    with pytest.raises(TrainError, match="no token to pad with"):
        load(base(tmp_path / "base", CHATML, pad_token="<|im_end|>"))


def test_a_beginning_of_text_is_named_and_not_in_the_template(tmp_path):
    loaded = load(base(tmp_path / "base", ("<s>", "<unk>", *CHATML), bos_token="<s>", unk_token="<unk>"))
    assert loaded.tokenizer("Hello").input_ids[0] == loaded.tokenizer.bos_token_id
    ids = loaded.tokenizer.apply_chat_template([QUESTION], return_dict=True)["input_ids"]
    assert ids[0] == loaded.start_id
    assert loaded.notes[-1].startswith("It puts special tokens around plain text")


WITHOUT_STOP = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if m.role != 'assistant' %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
LAST_WITHOUT_STOP = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
OTHER_STOP = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|endoftext|>' }}{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
ZEPHYR = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
BROKEN = "{{ raise_exception('only with tools') }}"


@pytest.mark.parametrize("template", [WITHOUT_STOP, LAST_WITHOUT_STOP, OTHER_STOP, PLAIN])
def test_a_base_whose_template_drops_the_stop_token_is_refused(tmp_path, template):
    folder = base(tmp_path / "base", ("<|endoftext|>", *CHATML), eos_token="<|im_end|>", chat_template=template)
    with pytest.raises(TrainError, match=r"does not write .* behind an answer.*Correct the template"):
        load(folder)


@pytest.mark.parametrize("template", [ZEPHYR, BROKEN])
def test_another_format_that_ends_its_turns_is_replaced_with_a_note(tmp_path, template):
    folder = base(tmp_path / "base", ("<|endoftext|>", *CHATML), eos_token="<|endoftext|>", chat_template=template)
    loaded = load(folder)
    assert loaded.tokenizer.chat_template == CHAT_TEMPLATE
    assert "replaced" in loaded.notes[0]


def test_a_folder_without_a_fast_tokenizer_or_with_a_broken_one_is_a_clear_error(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    with pytest.raises(TrainError, match=r"base has no fast tokenizer \(no tokenizer.json\)"):
        load(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(TrainError, match=r"tokenizer.json is not a tokenizer that can be read"):
        load(folder)


def test_a_base_on_the_hub_is_pinned_to_its_commit_and_its_weights_stay_there(loopback_hub, smol, smol_loaded):
    files = {name: (smol / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    everything = files | {"model.safetensors": b"weights", "modeling_base.py": b"raise SystemExit"}
    commit = loopback_hub.commit("team/base", everything, repo_type="model")
    loopback_hub.commit("team/base", {"tokenizer.json": b"{"}, repo_type="model")
    loaded = load_tokenizer("team/base", commit, Path("/nowhere"))
    assert loaded.commit == commit
    assert loaded.sha256 == smol_loaded.sha256
    assert not [path for _, path in loopback_hub.requests if "model.safetensors" in path or ".py" in path]
    with pytest.raises(TrainError, match="not a tokenizer that can be read"):
        load_tokenizer("team/base", "main", Path("/nowhere"))


def test_a_repository_without_a_fast_tokenizer_is_a_clear_error(loopback_hub):
    loopback_hub.commit("team/base", {"tokenizer.model": b"sentencepiece"}, repo_type="model")
    with pytest.raises(TrainError, match="team/base has no fast tokenizer"):
        load_tokenizer("team/base", "main", Path("/nowhere"))
