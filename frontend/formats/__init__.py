"""How checkpoints say that their weights are quantized: one reader per quantization method.

A reader makes a `Scheme` of its configuration, in which every key is accounted for; what reads
weights knows schemes and no methods.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import DiluError, Loc, UnsupportedError
from .autoround import read_autoround
from .compressed import read_compressed
from .fbgemm import read_fbgemm
from .form import Form, Module, Scheme, Unread
from .fp8 import read_fp8, unsaid
from .modelopt import FILE as MODELOPT_FILE
from .modelopt import check_twin, read_modelopt
from .quark import read_quark
from .settings import Settings

__all__ = [
    "METHODS",
    "Form",
    "Module",
    "Scheme",
    "Unread",
    "read_quantization",
    "unsaid",
    "without_quantization",
]

METHODS: dict[str, Callable[[Settings], Scheme]] = {
    "fp8": read_fp8,
    "mxfp8": read_fp8,
    "compressed-tensors": read_compressed,
    "modelopt": read_modelopt,
    "quark": read_quark,
    "fbgemm_fp8": read_fbgemm,
    "auto-round": read_autoround,
}
_KEYS = ("quantization_config", "compression_config")


def read_quantization(config: Mapping[str, Any], file: str = "config.json") -> Scheme | None:
    """Return how a configuration says that weights are stored, None when it says nothing.

    `file` is where the configuration is from; hf_quant_config.json is looked for beside it. Raises
    DiluError for a method that is not read, and for what a method's configuration must not say.
    """
    settings, twin = find(config, file), _twin(file)
    if settings is None:
        return None if twin is None else read_modelopt(twin)
    method = settings.text("quant_method")
    if method is None and ("quant_algo" in settings.values or "quantization" in settings.values):
        method = "modelopt"
    if method not in METHODS:
        raise UnsupportedError(
            f"unknown quantization method {method!r}",
            Loc(file),
            f"supported: {', '.join(METHODS)} (8-bit float weights), and no quantization",
        )
    if method == "modelopt" and twin is not None:
        check_twin(settings, twin)
    return METHODS[method](settings)


def find(config: Mapping[str, Any], file: str) -> Settings | None:
    """Return the object that says how weights are quantized, wherever a configuration has it;
    raise DiluError where two say different things."""
    found: list[Settings] = []
    text = config.get("text_config")
    for place, part in (("", config), ("text_config.", text)):
        if not isinstance(part, Mapping):
            continue
        for key in _KEYS:
            value = part.get(key)
            if value in (None, {}, False):
                continue
            if not isinstance(value, Mapping):
                raise DiluError(f"{place}{key} is not an object: {value!r}", Loc(file))
            found.append(Settings(value, f"{place}{key}", file))
    for other in found[1:]:
        if other.values != found[0].values:
            raise DiluError(
                f"{found[0].place} and {other.place} say different things",
                Loc(file),
                "remove the one that is not of these weights",
            )
    return found[0] if found else None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that says nothing of how weights are stored, of the same model."""
    plain = {k: v for k, v in config.items() if k not in _KEYS}
    text = plain.get("text_config")
    if isinstance(text, Mapping) and any(key in text for key in _KEYS):
        plain["text_config"] = {k: v for k, v in text.items() if k not in _KEYS}
        if not plain["text_config"]:
            del plain["text_config"]
    return plain


def _twin(file: str) -> Settings | None:
    """Return what hf_quant_config.json beside a configuration says, if it is there."""
    path = Path(file).parent / MODELOPT_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DiluError(f"not a configuration: {error}", Loc(str(path))) from None
    if not isinstance(values, Mapping):
        raise DiluError("not a configuration: it is no JSON object", Loc(str(path)))
    return Settings(values, MODELOPT_FILE, str(path))
