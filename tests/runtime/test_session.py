from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest

import dilu
from dilu.errors import DiluError
from dilu.runtime import machine
from dilu.runtime.artifact.artifact import Artifact
from dilu.runtime.session import Session


@pytest.fixture
def session(toy: Artifact):
    with dilu.load(toy, threads=2) as session:
        yield session


X = np.arange(6, dtype=np.float32).reshape(2, 3)
Y = X * [1, 2, 3] + np.array([10, 20, 30], np.float32)


def test_numpy_in_numpy_out(session):
    y, count = session.function("scale")(X)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, Y)
    assert count == 2


def test_any_layout_and_no_rows(session):
    scale = session.function("scale")
    np.testing.assert_array_equal(scale(np.asfortranarray(X))[0], Y)
    np.testing.assert_array_equal(scale(X[::-1])[0], Y[::-1])
    np.testing.assert_array_equal(scale(X.tolist())[0], Y)
    assert scale(X[:0])[0].shape == (0, 3)


def test_torch_in_torch_out(session):
    torch = pytest.importorskip("torch")
    y, count = session.function("scale")(torch.from_numpy(X).T.contiguous().T)
    assert isinstance(y, torch.Tensor)
    np.testing.assert_array_equal(y.numpy(), Y)
    assert count.item() == 2
    x = torch.tensor([1.5, -2.0, float("inf")], dtype=torch.bfloat16)
    y, total = session.function("bits")(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, x)
    assert total.item() == 3


def test_bf16_of_other_libraries(session):
    bits = np.array([0x3FC0, 0xC000], np.uint16)
    y, _ = session.function("bits")(bits)
    np.testing.assert_array_equal(y, bits)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    y, _ = session.function("bits")(bits.view(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(y, bits)


def test_dlpack(session):
    class Foreign:
        def __dlpack__(self, **options):
            return X.__dlpack__(**options)

        def __dlpack_device__(self):
            return X.__dlpack_device__()

    np.testing.assert_array_equal(session.function("scale")(Foreign())[0], Y)


def test_states_outlive_a_call(session):
    bits = session.function("bits")
    x = np.zeros(3, np.uint16)
    assert [bits(x)[1] for _ in range(3)] == [3, 6, 9]
    np.testing.assert_array_equal(bits.state("memory"), [3, 3, 3])
    bits.allocate({"N": 3})
    assert bits(x)[1] == 3


def test_states_can_grow(session):
    bits = session.function("bits")
    bits.allocate({"N": 2})
    bits.state("memory")[:] = [5, 6]
    bits.allocate({"N": 4}, keep=True)
    np.testing.assert_array_equal(bits.state("memory"), [5, 6, 0, 0])


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("scale", [], r"scale takes 1 arguments, not 0(.|\n)*its parameters are x: f32\[N,3\]"),
        ("scale", [X, X], "scale takes 1 arguments, not 2"),
        (
            "scale",
            [X.astype(np.float64)],
            r"scale: the argument x is f64\[2,3\], expected f32\[N,3\]",
        ),
        ("scale", [X[0]], r"the argument x is f32\[3\], expected f32\[N,3\]"),
        ("scale", [X[:, :2]], r"the argument x is f32\[2,2\], expected f32\[N,3\]"),
        ("scale", [X.astype("complex64")], "arrays of complex64 are not supported"),
        ("bits", [[1.0]], "bf16 values cannot be made from Python numbers"),
        ("broken", [], "the compiled function failed with code 5"),
        (
            "main",
            [np.zeros(n, np.int64) for n in (2, 3, 2, 2)] + [np.zeros((1, 1), np.int64), [0]],
            r"main: the argument positions is i64\[3\] where T=2, expected i64\[T\]",
        ),
        (
            "main",
            [np.zeros(2, np.int64)] * 4 + [np.zeros((1, 1), np.int64), [0]],
            "main: the arguments do not tell the size B",
        ),
    ],
)
def test_wrong_arguments(session, function, arguments, message):
    with pytest.raises(DiluError, match=message):
        session.function(function)(*arguments)


def test_a_tensor_elsewhere(session):
    torch = pytest.importorskip("torch")
    with pytest.raises(DiluError, match=r"a tensor on meta was passed(.|\n)*tensor.cpu\(\)"):
        session.function("scale")(torch.zeros(2, 3, device="meta"))


def test_no_such_function(session):
    with pytest.raises(DiluError, match=r"there is no function 'f'(.|\n)*has: main, scale"):
        session.function("f")


def test_no_such_state(session):
    with pytest.raises(DiluError, match="bits has no state 'x'"):
        session.function("bits").state("x")


def test_closed(toy):
    session = dilu.load(toy)
    scale = session.function("scale")
    session.close()
    session.close()
    with pytest.raises(DiluError, match="the session is closed"):
        scale(X)


def test_deleting_frees(toy, tmp_path):
    toy.save(tmp_path / "m.dilu")
    session = dilu.load(tmp_path / "m.dilu")
    session.function("scale")(X)
    maps = Path("/proc/self/maps")
    assert "checkpoint/model.safetensors" in maps.read_text()
    del session
    gc.collect()
    assert "checkpoint/model.safetensors" not in maps.read_text()


def test_calls_from_many_threads(session):
    bits = session.function("bits")
    x = np.zeros(100, np.uint16)
    bits.allocate({"N": 100})

    def work():
        for _ in range(50):
            bits(x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(bits.state("memory"), 200)


def test_threads(toy, monkeypatch):
    monkeypatch.setenv("DILU_THREADS", "3")
    assert Session(toy).threads == 3
    assert Session(toy, threads=1).threads == 1
    monkeypatch.delenv("DILU_THREADS")
    assert Session(toy).threads == machine.default_threads()
    with pytest.raises(DiluError, match="cannot run with 0 threads"):
        dilu.load(toy, threads=0)


def test_too_little_memory_is_said_before_loading(toy, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 1000)
    mapped = []
    monkeypatch.setattr("dilu.runtime.cpu.engine.Weights", lambda *a, **k: mapped.append(a))
    message = r"not enough memory: .* needed \(weights 1.1 kB, .*\), 1.0 kB available"
    with pytest.raises(DiluError, match=message) as caught:
        dilu.load(toy)
    assert "DILU_ALLOW_OVERCOMMIT=1" in str(caught.value)
    assert mapped == []


def test_too_little_memory_on_demand(toy, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 1000)
    monkeypatch.setenv("DILU_ALLOW_OVERCOMMIT", "1")
    np.testing.assert_array_equal(dilu.load(toy).function("scale")(X)[0], Y)


def test_configuration_only(toy):
    for constant in toy.manifest["constants"].values():
        constant["file"] = constant["offset"] = constant["tensor"] = None
    with pytest.raises(DiluError, match="toy was compiled from a configuration only"):
        dilu.load(toy)


def test_a_broken_library(toy):
    toy.files["kernels/cpu-baseline/module.so"] = b"not a library"
    with pytest.raises(DiluError, match="the kernels cannot be loaded"):
        dilu.load(toy)


def test_constants_outside_their_files(toy):
    toy.manifest["constants"]["bias"]["offset"] = [1 << 20]
    with pytest.raises(DiluError, match="places the constant bias outside its files"):
        dilu.load(toy)


@pytest.mark.parametrize(
    ("name", "wrong", "limit"),
    [
        ("tokens", 260, 259),
        ("positions", 8, 7),
        ("sequence", 1, 0),
        ("slots", -1, 11),
        ("pages", 3, 2),
        ("rows", 2, 1),
    ],
)
def test_a_batch_that_points_outside(session, name, wrong, limit):
    main = session.function("main")
    main.allocate({"B": 3})
    batch = {
        "tokens": np.array([65, 66]),
        "positions": np.array([0, 1]),
        "sequence": np.array([0, 0]),
        "slots": np.array([0, 1]),
        "pages": np.array([[0, 1]]),
        "rows": np.array([1]),
    }
    assert main(*batch.values()).shape == (1, 260)
    batch[name].flat[-1] = wrong
    with pytest.raises(DiluError, match=f"^{name} holds {wrong}, which is outside of 0 to {limit}"):
        main(*batch.values())


def test_a_format_on_the_wire_where_nothing_is_sent(toy):
    with pytest.raises(DiluError, match="sends no rows that could travel as bf16"):
        Session(toy, wire="bf16")
    with pytest.raises(DiluError, match="unknown format 'fp4'"):
        Session(toy, wire="fp4")
