"""A checkpoint's tokenizer in whatever files: what is kept says what transformers says."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from dilu.frontend.language.tokenizer import _PROBES, read_tokenizer

WORDS = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, 40)}
TEXTS = (
    *_PROBES,
    "w5 w6 w7", "<x>w5<y> w6 <z>", "w5  <x>  w6", "<y>w5 <y>", "W5 <X>", "a<z>b", "<z>", " <z> w5",
    "<s> w5 </s>", "w5<pad>w6", "w39 w40 w38",
)  # fmt: skip


def words(**post) -> Tokenizer:
    library = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name, value in post.items():
        setattr(library, name, value)
    return library


def letters(**post) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {t: i for i, t in enumerate(["<s>", "</s>", *alphabet])}
    library = Tokenizer(models.BPE(ids, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    for name, value in post.items():
        setattr(library, name, value)
    return library


def added(content: str, **flags) -> dict:
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    return {"content": content, **plain, **flags}


def write(folder: Path, library: Tokenizer | None, config=None, **files) -> Path:
    if library is not None:
        library.save(str(folder / "tokenizer.json"))
    if config is not None:
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def first(library: Tokenizer) -> Tokenizer:
    """Return the tokenizer with `<s>` before every text."""
    library.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return library


X = {"40": added("<x>", special=True), "41": added("<y>"), "42": added("<z>")}
VARIANTS: dict[str, dict] = {
    "plain": {"library": words()},
    "begins": {"library": first(words())},
    "added_tokens_decoder": {"library": words(), "config": {"added_tokens_decoder": X}},
    "left": {
        "library": words(),
        "config": {"added_tokens_decoder": X | {"41": added("<y>", lstrip=True)}},
    },
    "right": {
        "library": words(),
        "config": {"added_tokens_decoder": X | {"41": added("<y>", rstrip=True)}},
    },
    "single_word": {
        "library": letters(),
        "config": {"added_tokens_decoder": {"258": added("<z>", single_word=True)}},
    },
    "normalized": {
        "library": words(normalizer=normalizers.Lowercase()),
        "config": {"added_tokens_decoder": X | {"40": added("<x>", normalized=True)}},
    },
    "added_tokens": {
        "library": words(),
        "config": {},
        "added_tokens": {"<x>": 40, "<y>": 41},
    },
    "added_tokens_without_config": {"library": words(), "added_tokens": {"<x>": 40}},
    "special_tokens_map": {
        "library": words(),
        "config": {},
        "special_tokens_map": {"additional_special_tokens": ["<x>", "<y>"], "pad_token": "<pad>"},
    },
    "additional": {"library": words(), "config": {"additional_special_tokens": ["<x>", "<z>"]}},
    "extra": {"library": words(), "config": {"extra_special_tokens": {"image_token": "<x>"}}},
    "new_bos": {
        "library": words(),
        "config": {"bos_token": {"__type": "AddedToken", **added("<x>", special=True)}},
    },
    "two_files": {
        "library": words(),
        "config": {"added_tokens_decoder": X},
        "added_tokens": {"<y>": 40, "<x>": 41},
    },
    "gap": {
        "library": words(),
        "config": {"added_tokens_decoder": {"60": added("<x>", special=True)}},
    },
    "over_another": {
        "library": words(),
        "config": {"added_tokens_decoder": {"5": added("<x>", special=True)}},
    },
    "add_bos": {"library": words(), "config": {"add_bos_token": True}},
    "add_no_bos": {"library": first(words()), "config": {"add_bos_token": False}},
    "add_eos": {"library": words(), "config": {"add_eos_token": True}},
    "prefix_space": {"library": letters(), "config": {"add_prefix_space": True}},
    "split": {
        "library": words(),
        "config": {"split_special_tokens": True, "added_tokens_decoder": X},
    },
    "short": {"library": words(), "config": {"model_max_length": 2}},
    "gpt2": {"library": letters(), "config": {"tokenizer_class": "GPT2Tokenizer"}},
    "qwen2": {"library": letters(), "config": {"tokenizer_class": "Qwen2TokenizerFast"}},
    "unknown_class": {"library": letters(), "config": {"tokenizer_class": "NonesuchTokenizer"}},
    "clean_up": {"library": letters(), "config": {"clean_up_tokenization_spaces": True}},
    "legacy": {"library": letters(), "config": {"legacy": False, "use_default_system_prompt": 1}},
}


def cut(library: Tokenizer) -> Tokenizer:
    library.enable_truncation(2)
    return library


def padded(library: Tokenizer) -> Tokenizer:
    library.enable_padding(length=16, pad_id=2, pad_token="<pad>")
    return library


VARIANTS |= {
    "truncates": {"library": cut(words()), "config": {}},
    "pads": {"library": padded(words()), "config": {}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_and_texts_are_those_of_transformers(tmp_path, name):
    from transformers import AutoTokenizer

    write(tmp_path, **VARIANTS[name])
    found = read_tokenizer(tmp_path, 400)
    library = Tokenizer.from_str(found.files["tokenizer.json"].decode())
    config = json.loads(found.files["tokenizer_config.json"])
    library.encode_special_tokens = config.get("split_special_tokens", False)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert library.encode(text).ids == ids, text
        assert library.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        bare = theirs(text, add_special_tokens=False)["input_ids"]
        assert library.encode(text, add_special_tokens=False).ids == bare
    assert {k: v for k, v in config.items() if k.endswith("_token")} == theirs.special_tokens_map


def test_what_only_other_files_know_is_a_token(tmp_path):
    write(tmp_path, words(), {"added_tokens_decoder": X})
    found = read_tokenizer(tmp_path, 400)
    library = Tokenizer.from_str(found.files["tokenizer.json"].decode())
    assert library.encode("w5<x>w6 <z>").ids == [5, 40, 6, 42]
    assert found.notes == ()


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("gap", "'<x>' is token 60; as transformers reads it, it is token 40"),
        ("two_files", "added_tokens.json says that '<y>' is token 40"),
        ("over_another", "'<x>' is token 5; as transformers reads it"),
    ],
)
def test_tokens_that_are_not_where_a_file_says_are_named(tmp_path, name, note):
    write(tmp_path, **VARIANTS[name])
    notes = read_tokenizer(tmp_path, 400).notes
    if name == "two_files":  # the configuration comes first, and agrees
        assert notes == ()
    else:
        assert len(notes) == 1
        assert note in notes[0]


def test_tokens_beyond_the_models_vocabulary_are_named(tmp_path):
    write(tmp_path, words(), {"added_tokens_decoder": X})
    (note,) = read_tokenizer(tmp_path, 41).notes
    assert note.startswith("the tokenizer has 2 tokens, from 41 on, that the model's vocabulary")


@pytest.mark.parametrize(
    ("files", "note"),
    [
        ({}, "the checkpoint has no tokenizer: the artifact takes and returns tokens, not text"),
        ({"tokenizer_config.json": "{}"}, "the checkpoint has no tokenizer: "),
        ({"tiktoken.model": "IQ=="}, r"the tokenizer cannot be read \("),
        ({"tokenizer.model": "nothing"}, r"the tokenizer cannot be read \("),
        ({"tokenizer.json": "{}"}, r"the tokenizer cannot be read \("),
        ({"tokenizer.json": "{"}, r"the tokenizer cannot be read \("),
        ({"vocab.json": "{}"}, r"the tokenizer cannot be read \(|no fast form"),
    ],
)
def test_no_tokenizer(tmp_path, files, note):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = read_tokenizer(tmp_path, 320)
    assert found.files == {}
    assert len(found.notes) == 1

    assert re.search(note, found.notes[0])


def test_a_broken_configuration_leaves_no_tokenizer(tmp_path):
    write(tmp_path, words(), {"added_tokens_decoder": {"40": "<x>"}})
    found = read_tokenizer(tmp_path, 320)
    assert "cannot be read (TypeError" in found.notes[0]


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    (tmp_path / "tokenization_own.py").write_text("raise SystemExit('was run')")
    config = {
        "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]},
        "tokenizer_class": "Own",
    }
    write(tmp_path, words(), config)
    found = read_tokenizer(tmp_path, 320)
    assert Tokenizer.from_str(found.files["tokenizer.json"].decode()).encode("w5").ids == [5]


def test_an_unknown_model_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "newcomer"}))
    write(tmp_path, words())
    assert "tokenizer.json" in read_tokenizer(tmp_path, 320).files


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"chat_template.jinja": "file"}, "file"),
        ({"chat_template.json": json.dumps({"chat_template": "old"})}, "old"),
        ({"chat_template.jinja": "file", "chat_template.json": '{"chat_template": "old"}'}, "file"),
        ({"chat_template.json": "{"}, None),
        ({}, None),
    ],
)
def test_chat_templates(tmp_path, files, template):
    write(tmp_path, words(), {})
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    kept = read_tokenizer(tmp_path, 320).files
    assert kept.get("chat_template.jinja") == (template and template.encode())


def test_chat_templates_of_the_configuration(tmp_path):
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    write(tmp_path, words(), {"chat_template": named})
    kept = read_tokenizer(tmp_path, 320).files
    assert json.loads(kept["tokenizer_config.json"])["chat_template"] == named
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("r")
    (tmp_path / "chat_template.jinja").write_text("file")
    kept = read_tokenizer(tmp_path, 320).files
    assert json.loads(kept["tokenizer_config.json"])["chat_template"] == [
        {"name": "default", "template": "file"},
        {"name": "rag", "template": "r"},
    ]


def test_a_tokenizer_of_other_files(tmp_path):
    """What transformers can read is kept, whatever files it is made of."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate([*alphabet, "ab", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": None, "unk_token": "<|endoftext|>"}
    write(tmp_path, None, config | {"eos_token": "<|endoftext|>"})
    found = read_tokenizer(tmp_path, 400)
    library = Tokenizer.from_str(found.files["tokenizer.json"].decode())
    assert library.encode("ab").ids == [256]
    assert library.decode(library.encode("abé").ids) == "abé"


def test_added_tokens_keep_their_flags(tmp_path):
    library = words()
    library.add_tokens([AddedToken("<x>", lstrip=True, rstrip=True)])
    write(tmp_path, library, {})
    kept = Tokenizer.from_str(read_tokenizer(tmp_path, 320).files["tokenizer.json"].decode())
    assert kept.encode("w5 <x> w6").tokens == ["w5", " <x> ", "w6"]
