#!/usr/bin/env bash
# add_bos_token in tokenizer_config.json has no effect beside a tokenizer.json; as an argument it has.
#
# Versions: transformers 5.23.0, tokenizers 0.23.3.
# Files: a tokenizer.json of four words without a post-processor, and a tokenizer_config.json with
# bos_token and add_bos_token, as PreTrainedTokenizerFast, LlamaTokenizer and GPT2Tokenizer.
# Seen for "a b", whose ids are 2 3, in all three classes:
#     in the file true    2 3, and the tokenizer says add_bos_token False
#     in the file false   2 3
#     argument    true    0 2 3
# So a checkpoint's own files do not say whether its prompts begin with <s>: only the post-processor of
# tokenizer.json does, and a program that reads the flag feeds other tokens than transformers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
cd "$work"
TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" -W ignore - <<'EOF'
import json

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

words = models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2, "b": 3}, unk_token="<unk>")
tokenizer = Tokenizer(words)
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.save("tokenizer.json")
for name in ("PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer"):
    seen = []
    for flag in (True, False):
        with open("tokenizer_config.json", "w") as file:
            marks = {"bos_token": "<s>", "unk_token": "<unk>", "add_bos_token": flag}
            json.dump({"tokenizer_class": name} | marks, file)
        loaded = AutoTokenizer.from_pretrained(".")
        seen.append((loaded("a b").input_ids, loaded.add_bos_token))
    argument = AutoTokenizer.from_pretrained(".", add_bos_token=True)("a b").input_ids
    print(name, "file", seen, "argument", argument)
    assert seen == [([2, 3], False)] * 2 and argument == [0, 2, 3], (seen, argument)
EOF
