from __future__ import annotations

import json

import numpy as np
import pytest
from fake_gpu import add_target, gpu_artifact

import dilu
from dilu.errors import DiluError
from dilu.runtime.gpu.tuning import read_tuning, tuning_file, write_tuning
from dilu.runtime.tune import describe_tuning, tune


@pytest.fixture
def saved(cuda, tmp_path):
    return gpu_artifact(tmp_path / "checkpoint").save(tmp_path / "m.dilu")


@pytest.fixture
def with_nan(cuda, tmp_path):
    codes = np.full(256, 0xFF, np.uint8)
    return gpu_artifact(tmp_path / "checkpoint", codes=codes).save(tmp_path / "m.dilu")


def decoded(cuda, path) -> str:
    """Return which variant of `decode` a session launches."""
    cuda.clear()
    with dilu.load(path) as session:
        session.function("decode")(np.zeros(1, np.uint16))
    return cuda.launches[-1].symbol


def test_the_fastest_is_kept_and_used(saved, cuda):
    assert decoded(cuda, saved) == "decode_30us"
    steps = []
    with dilu.load(saved) as session:
        timings, file = tune(session, progress=lambda *step: steps.append(step))
    (timing,) = timings
    assert timing.kernel.name == "decode" and timing.best == 1
    assert timing.speed_up(1) == pytest.approx(3, rel=1e-3)
    assert len(timing.times) == 2  # at two sizes
    assert describe_tuning(timings).splitlines() == [
        "variants of kernels",
        "  kernel  default  chosen  speed-up",
        "  decode  BN=64    BN=32   3.00×",
    ]
    assert file.parent == saved.with_name("m.dilu.tuning")
    assert file.name.startswith("fake-gpu-0-12.4-")
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert decoded(cuda, saved) == "decode_10us"
    assert steps[0][0] == "measure kernels at T=64, S=1, P=16, R=1, B=16"
    with dilu.load(saved) as session:
        assert session.target_reason.endswith("tuned for this device (1 kernels)")


def test_representative_sizes_of_a_language_model(saved, cuda):
    with dilu.load(saved) as session:
        cuda.clear()
        tune(session)
    tokens = [launch.arguments[8] for launch in cuda.launches if launch.symbol == "logits"]
    assert tokens == [64, 16, 4, 1]


def test_variants_for_nan_codes_compete_among_themselves(with_nan, cuda):
    with dilu.load(with_nan) as session:
        timings, _ = tune(session)
    assert timings[0].best == 3
    assert timings[0].speed_up(3) == pytest.approx(4 / 3, rel=1e-3)
    assert decoded(cuda, with_nan) == "decode_nan_15us"


def test_choices_for_other_weights_and_devices_are_not_used(saved, cuda):
    artifact = dilu.Artifact.open(saved)
    with dilu.load(saved) as session:
        info = session.engine.device.info
        tune(session)
    assert read_tuning(artifact, "cuda:80", info, nan=False) == {"decode": 1}
    assert read_tuning(artifact, "cuda:80", info, nan=True) == {}
    assert read_tuning(artifact, "cuda:86", info, nan=False) == {}
    write_tuning(artifact, "cuda:86", info, {"decode": 0}, nan=False)
    assert read_tuning(artifact, "cuda:80", info, nan=False) == {"decode": 1}
    artifact.manifest["manifest_hash"] = "0" * 64
    assert read_tuning(artifact, "cuda:80", info, nan=False) == {}


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"format": 2}', b'{"format": 1, "targets": {"cuda:80": []}}']
)
def test_a_file_that_makes_no_sense_counts_for_nothing(saved, cuda, content):
    with dilu.load(saved) as session:
        file = tuning_file(session.artifact, session.engine.device.info)
    file.parent.mkdir()
    file.write_bytes(content)
    assert decoded(cuda, saved) == "decode_30us"


@pytest.mark.parametrize("index", [2, 99, -1, "1"])
def test_a_choice_that_is_not_allowed_counts_for_nothing(saved, cuda, index):
    with dilu.load(saved) as session:
        file = write_tuning(
            session.artifact, "cuda:80", session.engine.device.info, {"decode": 1}, nan=False
        )
    content = json.loads(file.read_text())
    content["targets"]["cuda:80"]["without_nan"]["decode"] = index
    file.write_text(json.dumps(content))
    assert decoded(cuda, saved) == "decode_30us"


def test_nothing_is_kept_for_an_artifact_in_memory(cuda, tmp_path):
    with dilu.load(gpu_artifact(tmp_path)) as session:
        with pytest.raises(DiluError, match=r"gpu is in memory only(.|\n)*hint: save it"):
            tune(session)


def test_nothing_to_tune_on_the_cpu(toy):
    with dilu.load(toy) as session:
        with pytest.raises(DiluError, match="cpu:baseline has nothing to tune"):
            tune(session)


def test_no_kernel_with_several_variants():
    assert describe_tuning([]) == "no kernel has several variants to choose from"


def test_the_commands(saved, cuda, capsys, monkeypatch):
    from dilu import cli

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in arguments])
        assert stop.value.code == 0, capsys.readouterr().err
        return capsys.readouterr()

    done = run("tune", saved, "--device", "cuda")
    assert "decode  BN=64    BN=32   3.00×" in done.out
    assert "kept in" in done.err
    shown = run("inspect", saved).out
    assert "kernels of cuda:80" in shown
    assert "touch   1         40         0       65.5 kB        -" in shown
    assert "runs here on cuda:0 (Fake GPU 0)" in shown
    assert "cuda:0  Fake GPU 0  8.0      1.07 GB" in run("targets").out


def test_text_on_the_cpu_of_an_artifact_with_both(toy, cuda):
    add_target(toy, "cuda:80")
    with dilu.load(toy, device="cpu") as session:
        assert session.target == "cpu:baseline"
