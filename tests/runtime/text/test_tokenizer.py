from __future__ import annotations

import json

import pytest

from dilu.errors import DiluError
from dilu.runtime.artifact.artifact import Artifact
from dilu.runtime.text.tokenizer import Tokenizer

BOS, END, USER = 256, 257, 258


@pytest.fixture
def make(toy: Artifact):
    def made(template: str | None = None, **config) -> Tokenizer:
        old = json.loads(toy.read("tokenizer_config.json"))
        toy.files["tokenizer_config.json"] = json.dumps(old | config).encode()
        if template is not None:
            toy.files["chat_template.jinja"] = template.encode()
        return Tokenizer(toy)

    return made


def test_encode_and_decode(make):
    tokenizer = make()
    assert tokenizer.encode("aé") == [BOS, *"aé".encode()]
    assert tokenizer.decode([BOS, *"aé".encode(), END]) == "aé"


@pytest.mark.parametrize(
    ("text", "config", "begins"),
    [
        ("a", {"add_bos_token": True}, [BOS]),
        ("a", {"add_bos_token": False}, []),
        ("a", {"add_bos_token": None}, [BOS]),
        ("a", {"bos_token": None}, [BOS]),
    ],
)
def test_bos(make, text, config, begins):
    assert make(**config).encode(text) == [*begins, *text.encode()]


def test_bos_that_only_the_configuration_knows(make, toy):
    library = json.loads(toy.read("tokenizer.json"))
    library["post_processor"] = None
    toy.files["tokenizer.json"] = json.dumps(library).encode()
    assert make().encode("a") == [*b"a"]
    assert make(add_bos_token=True).encode("a") == [BOS, *b"a"]
    assert make(add_bos_token=True).encode("<bos>a") == [BOS, *b"a"]


def test_no_half_characters(make):
    stream = make().stream()
    text = "aé€😀ß"
    pieces = [stream.step(b) for b in text.encode()]
    assert "".join(pieces) == text
    assert pieces[:3] == ["a", "", "é"]
    assert not any("�" in piece for piece in pieces)


def test_an_unfinished_character_is_not_printed(make):
    stream = make().stream()
    assert [stream.step(b) for b in "€".encode()[:2]] == ["", ""]


def test_special_tokens_are_not_printed(make):
    stream = make().stream([BOS, *b"hello"])
    assert [stream.step(t) for t in (*b"x", END, *b"y")] == ["x", "", "y"]


def test_streaming_joins_words_like_decoding(toy):
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    library = Library(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2, "<unk>": 3}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    toy.files["tokenizer.json"] = library.to_str().encode()
    tokenizer = Tokenizer(toy)
    assert tokenizer.decode([0, 1, 2]) == "a bc"
    stream = tokenizer.stream([0])
    assert stream.step(1) + stream.step(2) == " bc"


def test_chat(make):
    tokenizer = make()
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages) == "<bos><user>hi"
    assert tokenizer.encode_chat(messages) == [BOS, USER, *b"hi"]


def test_a_file_of_its_own_comes_first(make):
    assert make("{{ messages[0].content }}!").render_chat([{"content": "hi"}]) == "hi!"


def test_several_templates(make):
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    assert make(chat_template=named).render_chat([]) == "yes"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ {'a': 'é<'} | tojson }}", '{"a": "é<"}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}!{% endfor %}", "!"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "a"),
        ("{% if add_generation_prompt %}\n  go\n{% endif %}", "  go\n"),
        ("{{ eos_token }}{{ pad_token }}", "<end>"),
        ("{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}", "2"),
    ],
)  # fmt: skip
def test_what_templates_may_use(make, template, text):
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert make(template).render_chat(messages) == text


def test_transformers_says_the_same(make):
    jinja = pytest.importorskip("transformers.utils.chat_template_utils")
    template = (
        "{{ bos_token }}\n{% for m in messages %}\n  {{ m | tojson }}{{ m.content | trim }}\n"
        "{%- endfor %}\n{% if add_generation_prompt %}<a>{% endif %}"
    )
    messages = [{"role": "user", "content": " é "}, {"role": "assistant", "content": "x"}]
    compiled = jinja._compile_jinja_template(template)
    wanted = compiled.render(messages=messages, bos_token="<bos>", add_generation_prompt=True)
    assert make(template).render_chat(messages) == wanted


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "the chat template refused"),
        ("{{ messages.append(1) }}", "the chat template refused"),
        ("{% broken", "the chat template refused"),
        ("{{ 1 + 'a' }}", "the chat template refused"),
    ],
)
def test_templates_that_fail(make, template, message):
    with pytest.raises(DiluError, match=message):
        make(template).render_chat([])


def test_no_template(make):
    with pytest.raises(DiluError, match=r"no chat template(.|\n)*leave --chat out"):
        make(chat_template=None).encode_chat([])


def test_no_tokenizer(toy):
    del toy.files["tokenizer.json"]
    with pytest.raises(DiluError, match=r"toy has no tokenizer: the checkpoint had no tokenizer"):
        Tokenizer(toy)


def test_a_broken_tokenizer(toy):
    toy.files["tokenizer.json"] = b"{}"
    with pytest.raises(DiluError, match=r"the checkpoint's tokenizer\.json cannot be read"):
        Tokenizer(toy)


def test_a_missing_tokenizer_is_told_with_its_reason(toy):
    del toy.files["tokenizer.json"]
    why = "the tokenizer cannot be read (x): the artifact takes and returns tokens, not text"
    toy.manifest["language_model"]["notes"] = ["another", why]
    with pytest.raises(
        DiluError, match=r"toy has no tokenizer: the tokenizer cannot be read \(x\)"
    ):
        Tokenizer(toy)


def test_a_file_that_asks_for_it_neither_cuts_off_nor_pads(make, toy):
    from tokenizers import Tokenizer as Library

    library = Library.from_str(toy.read("tokenizer.json").decode())
    library.enable_truncation(2)
    library.enable_padding(length=9)
    toy.files["tokenizer.json"] = library.to_str().encode()
    assert make().encode("abcd") == [BOS, *b"abcd"]
    assert make().encode("") == [BOS]


def test_special_tokens_in_a_text_may_be_split(make):
    assert make().encode("<end>") == [BOS, END]
    assert make(split_special_tokens=True).encode("<end>") == [BOS, *b"<end>"]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ tools is defined }} {{ tools is none }}", "True True"),
        ("{{ documents is none }}", "True"),
        ("{{ pad_token is defined }} {{ bos_token is defined }}", "False True"),
        ("{{ messages[0].tool_calls is defined }}", "False"),
    ],
)
def test_what_is_defined_in_a_template_is_what_transformers_defines(make, template, text):
    messages = [{"role": "user", "content": "a", "tool_calls": None}]
    assert make(template).render_chat(messages) == text
