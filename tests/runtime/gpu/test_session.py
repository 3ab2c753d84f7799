"""Sessions on a GPU, from `load` to results, on the fake driver."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from fake_gpu import gpu_artifact, read_f32

import dilu
from dilu.errors import DiluError

X = np.arange(6, dtype=np.float32)


@pytest.fixture
def session(cuda, tmp_path):
    with dilu.load(gpu_artifact(tmp_path)) as session:
        cuda.clear()
        yield session


def test_numpy_in_numpy_out(session, cuda):
    y = session.function("twice")(X)
    assert isinstance(y, np.ndarray) and y.dtype == np.float32
    np.testing.assert_array_equal(y, 2 * X)
    (launch,) = cuda.launches
    assert (launch.symbol, launch.grid, launch.block) == ("double", (6, 1, 1), (128, 1, 1))
    assert launch.arguments[2:] == (6, 0, 0)  # the size, and two hidden pointers
    assert [line.split()[0] for line in cuda.log] == ["allocate", "upload", "launch", "download"]


def test_why_it_runs_there(session):
    assert session.target == "cuda:80"
    reason = "cuda:80 code on compute capability 8.0 of cuda:0 (Fake GPU 0)"
    assert session.target_reason == reason
    assert session.place == "cuda:0 (Fake GPU 0)"


def test_nothing_to_do(session, cuda):
    assert session.function("twice")(X[:0]).shape == (0,)
    assert cuda.launches == []


def test_a_plan_that_runs_three_times(session, cuda):
    chain = session.function("chain")
    x = np.arange(64, dtype=np.float32).reshape(1, 64)
    np.testing.assert_array_equal(chain(x), 2 * (x + 111))
    np.testing.assert_array_equal(chain.state("memory"), [[1], [1], [1]])
    adds = [launch.arguments for launch in cuda.launches if launch.symbol == "add"]
    first, second, third = adds
    assert first[2] == third[2] != second[2], "the last run writes the call's own buffer"
    assert (first[2], second[2]) == (second[0], third[0]), "results are the next parameters"
    assert [a[1] - first[1] for a in adds] == [0, 256, 512]
    counts = [launch.arguments[0] for launch in cuda.launches if launch.symbol == "count"]
    assert np.diff(counts).tolist() == [4, 4]
    # Arena: slot 0, spare 0, slot 0 of the called plan, scratch, then parameters and results.
    arena = first[2]
    assert arena % 256 == 0
    assert second[2] == arena + 256
    (touch, *_) = [launch for launch in cuda.launches if launch.symbol == "touch"]
    assert touch.arguments[:3] == (arena + 768, arena + 1024, 7)
    assert (touch.shared, touch.block) == (65536, (256, 1, 1))
    assert first[0] == arena + 768 + 256 + 512


def test_more_than_48_kb_of_shared_memory_is_asked_for(cuda, tmp_path):
    with dilu.load(gpu_artifact(tmp_path)):
        assert [line for line in cuda.log if "attribute" in line] == ["attribute touch 8 65536"]


def test_launches_depend_on_rows(session, cuda):
    decode = session.function("decode")
    decode(np.zeros(1, np.uint16))
    decode(np.zeros(33, np.uint16))
    shown = [(launch.symbol, launch.grid) for launch in cuda.launches]
    fast = ("decode_30us", (4, 1, 1))
    assert shown == [("row", (1, 1, 1)), fast, ("rows", (3, 2, 1)), fast]


def test_the_second_call_of_a_kind_is_replayed(session, cuda):
    twice = session.function("twice")
    for _ in range(3):
        np.testing.assert_array_equal(twice(X), 2 * X)
    words = [line.split()[0] for line in cuda.log if line.split()[0] in ("graph", "replay")]
    assert words == ["graph", "replay", "replay"]
    assert cuda.held.graphs == 1


def test_a_larger_arena_forgets_the_graphs(session, cuda):
    twice = session.function("twice")
    twice(X), twice(X)
    large = np.ones(5000, np.float32)
    np.testing.assert_array_equal(twice(large), 2 * large)
    assert cuda.held.graphs == 0
    np.testing.assert_array_equal(twice(X), 2 * X)
    np.testing.assert_array_equal(twice(X), 2 * X)
    assert cuda.held.graphs == 1


def test_a_state_that_moved_is_seen(session, cuda):
    chain = session.function("chain")
    x = np.zeros((1, 64), np.float32)
    chain(x), chain(x)
    chain.allocate({"N": 1})
    chain(x)
    np.testing.assert_array_equal(chain.state("memory"), [[1], [1], [1]])


def test_only_the_latest_kinds_are_kept(session, cuda):
    twice = session.function("twice")
    twice(np.ones(100, np.float32))
    for n in range(1, 41):
        twice(np.ones(n, np.float32)), twice(np.ones(n, np.float32))
    assert cuda.held.graphs == 32


def test_no_graphs_on_demand(cuda, tmp_path, monkeypatch):
    monkeypatch.setenv("DILU_GPU_GRAPHS", "0")
    with dilu.load(gpu_artifact(tmp_path)) as session:
        for _ in range(3):
            np.testing.assert_array_equal(session.function("twice")(X), 2 * X)
    assert "replay" not in cuda.log


def test_states_grow_and_keep_their_content(session, cuda):
    chain = session.function("chain")
    chain.allocate({"N": 2})
    chain(np.zeros((2, 64), np.float32))
    np.testing.assert_array_equal(chain.state("memory"), [[1, 0]] * 3)
    chain.allocate({"N": 5}, keep=True)
    np.testing.assert_array_equal(chain.state("memory"), [[1, 0, 0, 0, 0]] * 3)


def test_batches_are_padded(session, cuda):
    main = session.function("main")
    main.allocate({"B": 3})
    tokens = np.arange(17) % 8
    positions, slots = np.arange(17) % 12, np.arange(17) % 12
    pages = np.array([[0, 1, 2]])
    sequence, rows = np.zeros(17, np.int64), np.array([16, 3, 5])
    logits = main(tokens, positions, sequence, slots, pages, rows)
    assert logits.shape == (3, 8)
    (launch,) = cuda.launches
    assert launch.grid == (24, 4, 1)
    assert launch.arguments[8:13] == (24, 1, 4, 4, 3)  # T, S, P, R, B
    given = [
        np.array(read_i64(a, n)) for a, n in zip(launch.arguments, (24,) * 4 + (4, 4), strict=False)
    ]
    np.testing.assert_array_equal(given[0], [*tokens, *[0] * 7])
    np.testing.assert_array_equal(given[3], [*slots, *[-1] * 7])
    np.testing.assert_array_equal(given[4], [0, 1, 2, 0])
    np.testing.assert_array_equal(given[5], [16, 3, 5, 0])


def read_i64(address: int, count: int) -> list[int]:
    import ctypes

    return list((ctypes.c_int64 * count).from_address(address))


def test_a_grid_beyond_the_device(session):
    with pytest.raises(DiluError, match="kernel touch needs a grid of 1 × 70000 × 1 programs"):
        session.function("chain")(np.zeros((70000, 64), np.float32))


def test_a_number_beyond_i32(cuda, tmp_path):
    import fake_gpu

    table = fake_gpu.program()
    table["plans"][0]["steps"][0]["launches"][0]["arguments"][2]["size"] = "N * 1000000000"
    artifact = gpu_artifact(tmp_path)
    fake_gpu.add_target(artifact, "cuda:80", table)
    with dilu.load(artifact) as session:
        with pytest.raises(DiluError, match="the kernel double cannot count to 6000000000"):
            session.function("twice")(X)


def test_closing_gives_everything_back(cuda, tmp_path):
    session = dilu.load(gpu_artifact(tmp_path))
    twice = session.function("twice")
    twice(X), twice(X)
    session.function("chain")(np.zeros((1, 64), np.float32))
    session.close()
    session.close()
    del session
    with pytest.raises(DiluError, match="the session is closed"):
        twice(X)
    del twice
    gc.collect()
    assert cuda.held == type(cuda.held)(0, 0, 0, 0, 0, 0, 0, 0)


def test_on_amd(hip, tmp_path):
    with dilu.load(gpu_artifact(tmp_path, "hip:gfx942", "hip:gfx90a")) as session:
        assert session.target == "hip:gfx90a"
        assert session.target_reason == "hip:gfx90a code for gfx90a of hip:0 (Fake GPU 0)"
        for _ in range(3):
            np.testing.assert_array_equal(session.function("twice")(X), 2 * X)
        assert "replay" in hip.log
    assert hip.held.memory == 0


def test_weights_are_where_kernels_expect_them(session, cuda):
    session.function("chain")(np.zeros((1, 64), np.float32))
    session.function("decode")(np.zeros(1, np.uint16))
    add = next(launch for launch in cuda.launches if launch.symbol == "add")
    assert add.arguments[1] % 256 == 0
    assert set(read_f32(add.arguments[1] + 256, 64)) == {10}
