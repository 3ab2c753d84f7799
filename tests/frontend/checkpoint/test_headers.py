"""Headers of safetensors files: what they say, and what is wrong with a file."""

import json
import struct

import pytest

from dilu.errors import DiluError
from dilu.frontend.checkpoint.headers import read_headers

FILE = "a.safetensors"


def put(folder, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(element, shape, begin, end):
    return {"dtype": element, "shape": shape, "data_offsets": [begin, end]}


def test_offsets_count_from_the_beginning_of_the_file(tmp_path):
    put(tmp_path, {"a": entry("F32", [2], 0, 8), "b": entry("F8_E4M3", [], 8, 9)}, bytes(9))
    found = read_headers(tmp_path, FILE)
    size = (tmp_path / FILE).stat().st_size
    assert (found["a"].offset, found["a"].nbytes, found["a"].dtype.name) == (size - 9, 8, "f32")
    assert (found["b"].offset, found["b"].shape, found["b"].dtype.name) == (size - 1, (), "f8e4m3")


@pytest.mark.parametrize("element", ["F4", "F6_E2M3", "F8_E4M3FNUZ", "I4", "C64"])
def test_an_unknown_element_type_is_an_error_for_who_wants_its_values(tmp_path, element):
    put(tmp_path, {"a": entry(element, [4], 0, 2), "b": entry("U8", [1], 2, 3)}, bytes(3))
    found = read_headers(tmp_path, FILE)
    assert found["b"].dtype.name == "u8"
    with pytest.raises(DiluError, match=rf"unknown element type '{element}'[\s\S]*tensor 'a'"):
        _ = found["a"].dtype


def test_names_are_any_text(tmp_path):
    names = ["", " ", "a\nb", "π.weight", "../x", "__metadata"]
    put(tmp_path, {n: entry("U8", [1], i, i + 1) for i, n in enumerate(names)}, bytes(6))
    assert list(read_headers(tmp_path, FILE)) == names


def test_a_file_that_is_shorter_than_its_header_says(tmp_path):
    put(tmp_path, {"a": entry("F32", [200], 0, 800)}, bytes(800))
    data = (tmp_path / FILE).read_bytes()
    for keep in (len(data) - 1, 100, 30, 4, 0):
        (tmp_path / FILE).write_bytes(data[:keep])
        message = rf"truncated safetensors file: it has {keep} bytes[\s\S]*download is incomplete"
        with pytest.raises(DiluError, match=message):
            read_headers(tmp_path, FILE)


@pytest.mark.parametrize(
    "header",
    [
        b"{nonsense",
        b"[1, 2]",
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": "ab"}}',
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b'{"a": 3}',
        b"\xff\xfe",
    ],
)
def test_a_broken_header(tmp_path, header):
    put(tmp_path, header, bytes(64))
    with pytest.raises(DiluError, match=rf"broken safetensors header[\s\S]*{FILE}") as caught:
        read_headers(tmp_path, FILE)
    assert "incomplete" not in str(caught.value)


def test_what_is_no_safetensors_file(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    for data, message in (
        (pointer, "a pointer of Git LFS"),
        (b"\xff" * 99, "begins with no h"),
    ):
        (tmp_path / FILE).write_bytes(data)
        with pytest.raises(DiluError, match=message) as caught:
            read_headers(tmp_path, FILE)
        assert "incomplete" not in str(caught.value)
