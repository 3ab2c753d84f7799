"""What checkpoints say about making text: used, irrelevant with a reason, or named."""

import json

import pytest

from dilu.errors import DiluError
from dilu.frontend.language.generation import IRRELEVANT, NOT_APPLIED, USED, read_generation


class Config:
    eos_token_id = 1
    bos_token_id = 0


@pytest.fixture
def read(tmp_path):
    def read(generation=None, **settings):
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return read_generation(tmp_path, settings, Config())

    return read


def test_every_setting_of_transformers_is_known():
    from transformers import GenerationConfig

    settings = {k for k in vars(GenerationConfig()) if not k.startswith("_")}
    known = {*USED, *IRRELEVANT, *NOT_APPLIED}
    assert settings - known == set()
    assert len(known) == len(USED) + len(IRRELEVANT) + len(NOT_APPLIED)
    assert all(len(reason) > 10 for reason in IRRELEVANT.values())


@pytest.mark.parametrize(
    ("generation", "settings", "eos"),
    [
        (None, {}, (1,)),
        (None, {"eos_token_id": 5}, (5,)),
        (None, {"eos_token_id": [5, 6]}, (5, 6)),
        (None, {"text_config": {"eos_token_id": 7}}, (7,)),
        (None, {"eos_token_id": 5, "text_config": {"eos_token_id": 7}}, (5,)),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 5}, (7, 8)),
        ({"eos_token_id": None}, {}, (1,)),
        ({}, {}, (1,)),
        ({"eos_token_id": -1}, {}, ()),
    ],
)
def test_end_tokens(read, generation, settings, eos):
    assert read(generation, **settings).eos == eos


@pytest.mark.parametrize(("said", "bos"), [({}, 0), ({"bos_token_id": 3}, 3)])
def test_begin_token(read, said, bos):
    assert read(said).bos == bos


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("repetition_penalty", 1.1),
        ("no_repeat_ngram_size", 3),
        ("min_new_tokens", 4),
        ("min_length", 4),
        ("num_beams", 4),
        ("suppress_tokens", [3]),
        ("begin_suppress_tokens", [3]),
        ("bad_words_ids", [[3]]),
        ("forced_bos_token_id", 0),
        ("forced_eos_token_id", 1),
        ("sequence_bias", [[[3], 1.0]]),
        ("exponential_decay_length_penalty", [3, 1.1]),
        ("guidance_scale", 1.5),
        ("watermarking_config", {"bias": 2.0}),
        ("stop_strings", ["\n"]),
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("token_healing", True),
        ("force_words_ids", [[3]]),
    ],
)
def test_settings_that_are_not_applied_are_named(read, key, value):
    note = f"generation_config.json asks for {key}: {value!r}, which is not applied"
    assert read({key: value}).notes == (note,)
    assert read({}, **{key: value}).notes == ()  # the file's own settings are the only ones


def test_without_the_file_config_json_says_it(read):
    (note,) = read(repetition_penalty=1.2, hidden_size=3).notes
    assert note == "config.json asks for repetition_penalty: 1.2, which is not applied"


@pytest.mark.parametrize("key", NOT_APPLIED)
def test_settings_that_ask_for_nothing_are_not_named(read, key):
    for value in (None, False, *NOT_APPLIED[key]):
        assert read({key: value}).notes == ()


@pytest.mark.parametrize("key", ["min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"])
def test_settings_of_sampling_matter_where_there_is_some(read, key):
    assert read({key: 0.3}).notes == ()
    assert len(read({key: 0.3, "do_sample": True}).notes) == 1


@pytest.mark.parametrize("key", IRRELEVANT)
def test_settings_that_change_no_token_are_not_named(read, key):
    assert read({key: 3}).notes == ()


def test_a_setting_that_nobody_knows_is_named(read):
    assert read({"temper": 3}).notes == (
        "generation_config.json: temper is not known, and not applied",
    )


@pytest.mark.parametrize(
    ("said", "sampling"),
    [
        ({}, {}),
        ({"temperature": 0.6}, {}),
        ({"do_sample": False, "temperature": 0.6}, {}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        ),
        ({"do_sample": True, "top_k": 0, "top_p": 1.0}, {"temperature": 1.0}),
    ],
)
def test_sampling_that_the_checkpoint_suggests(read, said, sampling):
    assert read(said).sampling == sampling


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', which is no token"),
        ({"eos_token_id": [1, None]}, r"eos_token_id is \[1, None\], which is no token"),
        ({"bos_token_id": True}, "bos_token_id is True, which is no token"),
        ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot', which is no number"),
    ],
)
def test_values_that_make_no_sense(read, said, message):
    with pytest.raises(DiluError, match=message):
        read(said)


def test_a_file_that_is_no_json(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(DiluError, match="not a configuration"):
        read_generation(tmp_path, {}, Config())
