from __future__ import annotations

import numpy as np
import pytest

from dilu.errors import DiluError
from dilu.planner.expert_load import load_text, read_load


def test_what_is_written_is_read(tmp_path):
    file = tmp_path / "load.json"
    layers = {"a": np.array([[1, 2, 3], [4, 5, 6]]), "b": np.array([[7, 8]])}
    file.write_text(load_text(layers))
    loads = read_load(file)
    assert (loads.of("a", 2, 3) == layers["a"]).all()
    with pytest.raises(DiluError, match=r"of another model: it has a: 2×3, b: 1×2, not c: 1×2"):
        loads.of("c", 1, 2)
    with pytest.raises(DiluError, match="of another model"):
        loads.of("a", 3, 3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no json", "not a load of experts"),
        ("{}", "not a load of experts"),
        ('{"expert_load": 2, "layers": {}}', "version 2"),
        ('{"expert_load": 1, "layers": {"a": [[1], [1, 2]]}}', "not a load of experts"),
        ('{"expert_load": 1, "layers": {"a": [[-1, 2]]}}', "the load of a is no table of counts"),
        ('{"expert_load": 1, "layers": {"a": [1, 2]}}', "the load of a is no table of counts"),
    ],
)
def test_files_that_are_none(tmp_path, text, says):
    file = tmp_path / "load.json"
    file.write_text(text)
    with pytest.raises(DiluError, match=says):
        read_load(file)


def test_no_file(tmp_path):
    with pytest.raises(DiluError, match="cannot read the load of experts"):
        read_load(tmp_path / "none.json")
