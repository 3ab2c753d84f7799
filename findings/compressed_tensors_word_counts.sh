#!/usr/bin/env bash
# compressed-tensors changed how it packs 3, 5, 6 and 7 bits, and reads older files wrong.
#
# Versions: compressed-tensors 0.17.0 and 0.20.0, each with torch 2.13.0 (CPU), numpy 2.4.6.
# Input: 96 whole numbers of 2 to 8 bits, packed into words of 32 bits.
# Seen:
#     bits            2   3   4   5   6   7   8
#     words, 0.17.0   6  10  12  16  20  24  24    whole numbers in a word, the rest of it unused
#     words, 0.20.0   6   9  12  15  18  21  24    numbers cross words
#     0.17.0's words read by 0.20.0: all numbers right for 2, 4 and 8 bits; for 3, 5, 6 and 7 bits most
#     are wrong, with no error
# Nothing in a checkpoint names the way: a reader has to tell it from the number of words, and cannot
# where both give the same.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 compressed-tensors==0.17.0 loguru psutil
cd "$work"
cat >pack.py <<'EOF'
import sys

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32


def numbers(bits):
    codes = torch.arange(96) * 7 % (1 << bits)
    return (codes - (1 << (bits - 1))).to(torch.int8)[None]


packed = {bits: pack_to_int32(numbers(bits), bits) for bits in range(2, 9)}
words = [tensor.shape[1] for tensor in packed.values()]
print(compressed_tensors.__version__, "words", words)
if sys.argv[1] == "write":
    torch.save(packed, "packed.pt")
    assert words == [6, 10, 12, 16, 20, 24, 24], words
else:
    assert words == [6, 9, 12, 15, 18, 21, 24], words
    wrong = {}
    for bits, tensor in torch.load("packed.pt").items():
        read = unpack_from_int32(tensor, bits, torch.Size([1, 96]))
        wrong[bits] = int((read != numbers(bits)).sum())
    print("wrong numbers of 96, by bits", wrong)
    assert all((count > 48) == (bits in (3, 5, 6, 7)) for bits, count in wrong.items()), wrong
    assert wrong[2] == wrong[4] == wrong[8] == 0, wrong
EOF
"$work/venv/bin/python" -W ignore pack.py write
"$work/venv/bin/pip" install --quiet --disable-pip-version-check compressed-tensors==0.20.0
"$work/venv/bin/python" -W ignore pack.py read
