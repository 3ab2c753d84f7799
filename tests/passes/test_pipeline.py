"""Running, watching and blaming passes."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest

from dilu.errors import DiluError
from dilu.ir.graph import Graph
from dilu.ir.stages import STAGES
from dilu.ir.text import parse_graph
from dilu.passes.manager import pass_name, run_passes, stage_texts
from dilu.passes.pipeline import compile_graph, pipeline, with_extra

TARGET = SimpleNamespace(native=frozenset())
GRAPH = parse_graph("""graph captured
func @main(%x: f32[T,8]) {
  %one: f32[] = literal() {dtype=f32, value=1.0}
  %a: f32[T,8] = mul(%x, %one)
  %b: f32[T,8] = exp(%a)
  return %b
}""")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.delenv("DILU_PRINT", raising=False)
    monkeypatch.delenv("DILU_DUMP", raising=False)


def nothing(graph: Graph) -> Graph:
    return graph


def names(stages) -> list[str]:
    return [pass_name(p) for passes in stages.values() for p in passes]


def test_every_stage_is_completed():
    graph, records = compile_graph(GRAPH, TARGET)
    assert graph.stage == "planned"
    texts = stage_texts(GRAPH, records)
    assert tuple(texts) == tuple(s for s in STAGES if s != "sharded")  # only with a mesh
    for stage, text in texts.items():
        assert text.startswith(f"graph {stage}\n")
    assert [r.name for r in records] == names(pipeline(TARGET))


def test_records_count_ops():
    _, records = compile_graph(GRAPH, TARGET)
    dead = next(r for r in records if r.name == "eliminate_dead")
    assert (dead.nodes_before, dead.nodes_after) == (2, 1)
    assert dead.ops == {"literal": -1}
    assert all(r.seconds >= 0 for r in records)


def test_every_pass_says_what_it_does():
    for passes in pipeline(TARGET).values():
        for step in passes:
            while isinstance(step, partial):
                step = step.func
            text = step.__doc__
            assert text is not None
            assert all(word in text for word in ("Before:", "After:", "Numerics: "))
            first, _, rest = text.partition("\n")
            assert first.endswith((".", ",")) or rest.strip()


def test_progress():
    heard: list[str] = []
    compile_graph(GRAPH, TARGET, on_pass=heard.append)
    assert heard == names(pipeline(TARGET))


@pytest.mark.parametrize(
    ("extra", "neighbours"),
    [
        (nothing, ("hoist_take", "nothing", "legalize_float8")),
        (("after:fold_constants", nothing), ("fold_constants", "nothing", "expand_powers")),
        (("fuse_matmul", nothing), ("fuse_matmul", "nothing", "fuse_updates")),
        (("before:plan_memory", nothing), ("fuse_rest", "nothing", "plan_memory")),
        (("replace:fuse_matmul", nothing), ("fuse_experts", "nothing", "fuse_updates")),
    ],
)
def test_a_users_pass(extra, neighbours):
    found = names(with_extra(pipeline(TARGET), [extra]))
    at = found.index("nothing")
    assert tuple(found[at - 1 : at + 2]) == neighbours
    _, records = compile_graph(GRAPH, TARGET, passes=[extra])
    assert "nothing" in [r.name for r in records]


def test_a_pass_left_out():
    found = names(with_extra(pipeline(TARGET), [("replace:fuse_loops", None)]))
    assert "fuse_loops" not in found


def test_a_place_there_is_not():
    for place in ("after:fuse_everything", "during:fuse_loops"):
        with pytest.raises(DiluError, match=f"there is no place '{place}' for a pass") as caught:
            compile_graph(GRAPH, TARGET, passes=[(place, nothing)])
        assert "fuse_loops" in str(caught.value.hint)


def test_errors_name_the_pass():
    def careless(graph: Graph) -> Graph:
        raise DiluError("no")

    def clumsy(graph: Graph) -> Graph:
        return {}["x"]

    def silent(graph: Graph) -> Graph:
        return None

    def breaks(graph: Graph) -> Graph:
        return parse_graph(
            "graph captured\nfunc @f(%x: f32[T]) {\n  %y: f32[4] = exp(%x)\n return %y }"
        )

    for step, message in (
        (careless, "no"),
        (clumsy, "KeyError: 'x'"),
        (silent, "the pass returned NoneType, not a Graph"),
        (breaks, r"invalid graph in @f, .*: the types should be f32\[T\]"),
    ):
        with pytest.raises(DiluError, match=message) as caught:
            compile_graph(GRAPH, TARGET, passes=[step])
        assert caught.value.pass_name == step.__name__
        assert f"in pass {step.__name__}" in str(caught.value)


def test_what_is_captured_is_verified():
    broken = parse_graph(
        "graph captured\nfunc @f(%x: f32[T]) {\n  %y: f32[4] = exp(%x)\n return %y }"
    )
    with pytest.raises(DiluError, match="the types should be"):
        run_passes(broken, {"normalized": [nothing]})


def test_printing(monkeypatch, capsys):
    monkeypatch.setenv("DILU_PRINT", "before:fold_constants,after:simplify_identities")
    compile_graph(GRAPH, TARGET)
    text = capsys.readouterr().err
    heads = [line for line in text.splitlines() if line.startswith("# ")]
    assert heads == [
        "# before fold_constants",
        "# after simplify_identities",
        "# after simplify_identities",
    ]
    assert text.count("mul(%x, %one)") == 1
    monkeypatch.setenv("DILU_PRINT", "all")
    compile_graph(GRAPH, TARGET)
    heads = [s for s in capsys.readouterr().err.splitlines() if s.startswith("# after")]
    assert heads == [f"# after {name}" for name in names(pipeline(TARGET))]


def test_printing_after_a_pass_there_is_not(monkeypatch):
    monkeypatch.setenv("DILU_PRINT", "after:simplify")
    with pytest.raises(DiluError, match="DILU_PRINT asks for 'after:simplify', and there is no"):
        compile_graph(GRAPH, TARGET)


def test_dumping(monkeypatch, tmp_path):
    folder = tmp_path / "dump"
    monkeypatch.setenv("DILU_DUMP", str(folder))
    graph, _ = compile_graph(GRAPH, TARGET)
    files = sorted(f.name for f in folder.iterdir())
    assert files[:2] == ["00-captured.txt", "01-absorb_mla.txt"]
    assert files[-1].endswith("-plan_memory.txt")
    assert parse_graph((folder / files[-1]).read_text("utf-8")) == graph
