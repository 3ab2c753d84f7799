from __future__ import annotations

import pytest

import dilu
from dilu.errors import DiluError

V = 260


@pytest.fixture
def session(toy):
    with dilu.load(toy, threads=1) as session:
        yield session


def said(session, text, count=8):
    """What the toy says after a text, by its rule and the tokenizer."""
    tokens = session.language.encode(text)
    start = len(tokens)
    while len(tokens) < start + count:
        tokens.append(sum(tokens) % V)
    stream = session.language.tokenizer.stream(tokens[:start])
    return "".join(stream.step(token) for token in tokens[start:])


def test_generate(session):
    assert session.generate("ab", max_tokens=4) == said(session, "ab", 4)


def test_streaming_says_the_same(session):
    pieces = list(session.stream("ab", max_tokens=8))
    assert "".join(pieces) == session.generate("ab", max_tokens=8)
    assert all(pieces)


def test_several_prompts(session):
    prompts = ["ab", "hello there", "x"]
    assert session.generate(prompts, max_tokens=6) == [
        session.generate(p, max_tokens=6) for p in prompts
    ]


def test_tokens_for_a_prompt(session):
    tokens = session.language.encode("ab")
    assert session.generate(tokens, max_tokens=4) == session.generate("ab", max_tokens=4)
    assert len(session.generate([tokens, tokens], max_tokens=4)) == 2


def test_chat(session):
    messages = [{"role": "user", "content": "hi"}]
    assert session.generate("hi", chat=True) == session.generate(messages)
    assert session.language.encode("hi", chat=True) == [256, 258, *b"hi"]


@pytest.fixture
def saying(session, monkeypatch):
    """Make the model say a given text."""

    def say(text):
        def generated(self, prompts, *, max_tokens, sampling=None, statistics=None):
            for byte in text.encode()[:max_tokens]:
                yield from ((index, byte) for index in range(len(prompts)))

        monkeypatch.setattr("dilu.runtime.text.generate.TokenLoop.generate", generated)
        return session

    return say


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("lo", "hel"),
        (["wor", "l"], "he"),
        (["xyz", ""], "hello world, lo"),
        ("ld, lo!", "hello world, lo"),
        (["o w", "world"], "hell"),
    ],
)
def test_stop(saying, stop, text):
    session = saying("hello world, lo")
    assert session.generate("x", stop=stop) == text
    assert "".join(session.stream("x", stop=stop)) == text


def test_what_may_begin_a_stop_text_is_held_back(saying):
    pieces = list(saying("abcabd").stream("x", stop="abd"))
    assert pieces == ["abc"]
    assert list(saying("xab").stream("x", stop="abd")) == ["x", "ab"]


def test_statistics_of_a_stream(session):
    stream = session.stream("ab", max_tokens=4)
    next(stream)
    stream.close()
    assert stream.statistics.prompt_tokens == 3
    assert stream.statistics.new_tokens >= 1
    assert session.language.loop._pool.used == 0


def test_logits(session):
    (logits,) = session.language.logits(["ab"])
    assert logits.shape == (3, V)


def test_not_a_language_model(toy):
    toy.manifest["language_model"] = None
    with dilu.load(toy) as session, pytest.raises(DiluError, match="toy is not a language model"):
        session.generate("x")


def test_a_prompt_that_is_too_long(session):
    with pytest.raises(DiluError, match="the prompt is longer than the maximum: 101 tokens"):
        session.stream("x" * 100)
