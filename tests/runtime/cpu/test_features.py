from __future__ import annotations

from dilu.runtime.cpu.features import parse_cpuinfo


def test_features_are_those_of_the_first_processor():
    two = "processor : 0\nflags\t\t: fpu avx2 fma\n\nprocessor : 1\nflags\t\t: fpu\n"
    assert parse_cpuinfo(two) == {"fpu", "avx2", "fma"}
    assert parse_cpuinfo("Features\t: asimd fp\n") == {"asimd", "fp"}
    assert parse_cpuinfo("nothing here") == frozenset()
