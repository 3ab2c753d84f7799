"""Measure what the machine can do at most: read bandwidth and f32 FMA rate, by threads.

    python benchmarks/limits.py [--threads 2]

Every benchmark quotes its figures as shares of these, measured in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

SOURCE = r"""
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
typedef float f8 __attribute__((vector_size(32)));
typedef long long i4 __attribute__((vector_size(32)));

void *allocate(size_t bytes) {
  char *p = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return 0;
  madvise(p, bytes, MADV_HUGEPAGE);
  for (size_t i = 0; i < bytes; i += 4096) p[i] = (char)i;
  return p;
}
void release(void *p, size_t bytes) { munmap(p, bytes); }

long long read_all(const char *p, size_t bytes) {
  i4 a = {0}, b = {0}, c = {0}, d = {0};
  for (size_t i = 0; i + 128 <= bytes; i += 128) {
    __builtin_prefetch(p + i + 4096);
    __builtin_prefetch(p + i + 4096 + 64);
    a ^= *(const i4 *)(p + i);
    b ^= *(const i4 *)(p + i + 32);
    c ^= *(const i4 *)(p + i + 64);
    d ^= *(const i4 *)(p + i + 96);
  }
  a ^= b ^ c ^ d;
  return a[0] ^ a[1] ^ a[2] ^ a[3];
}

/* 10 independent chains hide the latency and leave registers for m and a; 160 flop a round. */
float multiply_add(long long times, float factor, float term) {
  f8 x[10], m = {0}, a = {0};
  m += factor;
  a += term;
  for (int j = 0; j < 10; j++) x[j] = a * (float)j;
  for (long long i = 0; i < times; i++)
#pragma GCC unroll 10
    for (int j = 0; j < 10; j++) x[j] = x[j] * m + a;
  for (int j = 1; j < 10; j++) x[0] += x[j];
  return x[0][0];
}
"""


@cache
def _library() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp())
    source, library = folder / "limits.c", folder / "limits.so"
    source.write_text(SOURCE)
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, str(source), "-o", str(library)], check=True)
    lib = ctypes.CDLL(str(library))
    lib.allocate.restype = ctypes.c_void_p
    lib.allocate.argtypes = [ctypes.c_size_t]
    lib.release.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    lib.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    lib.multiply_add.argtypes = [ctypes.c_longlong, ctypes.c_float, ctypes.c_float]
    lib.multiply_add.restype = ctypes.c_float
    return lib


def _together(work: list[tuple]) -> float:
    """Run calls `(function, *arguments)` on a thread each; return the seconds all of them took."""
    threads = [threading.Thread(target=w[0], args=w[1:]) for w in work]
    start = time.perf_counter()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return time.perf_counter() - start


def read_bandwidth(threads: int, *, mebibytes: int = 512, repeats: int = 7) -> float:
    """Return GB/s of reading memory that is in no cache, on huge pages; the median of repeats."""
    lib = _library()
    total = mebibytes << 20
    share = total // threads // 128 * 128
    base = lib.allocate(total)
    try:
        work = [(lib.read_all, base + i * share, share) for i in range(threads)]
        return statistics.median(share * threads / _together(work) for _ in range(repeats)) / 1e9
    finally:
        lib.release(base, total)


def fma_rate(threads: int, *, rounds: int = 20_000_000, repeats: int = 7) -> float:
    """Return GFLOP/s of f32 fused multiply-add in registers; the median of repeats."""
    lib = _library()
    work = [(lib.multiply_add, rounds, 0.999, 1e-3)] * threads
    flop = 160 * rounds * threads
    return statistics.median(flop / _together(work) for _ in range(repeats)) / 1e9


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    n = parser.parse_args().threads
    print(f"{n} threads: read {read_bandwidth(n):.1f} GB/s, FMA {fma_rate(n):.1f} GFLOP/s")
