"""What models do to their logits, where a text part alone would do something else than the whole.

A model of several parts often has a head of its own, and its text part's class one too. What the
second scales or caps, and the first does not, would be another function of the same checkpoint.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from ...errors import Loc, UnsupportedError


def require_same_head(whole: Any, text: Any, settings: Mapping[str, Any], file: str) -> None:
    """Raise UnsupportedError where logits of the text part alone are not those of the whole.

    `whole` and `text` are configurations of transformers, `settings` is the config.json.
    """
    outer, alone = _whole_class(whole, settings), _causal_class(text)
    if outer is None or alone is None or "lm_head(" not in _forward(outer):
        return  # the head is the text part's own
    for name in sorted(_about_logits(alone)):
        value = getattr(text, name, None)
        if isinstance(value, float) and value != 1.0 and name not in _forward(outer):
            raise UnsupportedError(
                f"the text part alone ({alone.__name__}) applies {name} {value!r} to its logits, "
                f"and {outer.__name__} does not",
                Loc(file),
                f"say {name}: 1.0 in its text part if the whole model is meant",
            )


def _forward(cls: Any) -> str:
    """Return the text of a model's `forward`, without comments."""
    return re.sub(r'"""[\s\S]*?"""|#.*', "", inspect.getsource(cls.forward))


def _about_logits(cls: Any) -> set[str]:
    lines = (line for line in _forward(cls).splitlines() if "logits" in line)
    return {name for line in lines for name in re.findall(r"\.(\w+)", line)}


def _causal_class(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    return known.get(type(config), None)


def _whole_class(config: Any, settings: Mapping[str, Any]) -> Any:
    """Return the class of a model of several parts: what `architectures` names, or the usual."""
    import transformers
    from transformers.models.auto import modeling_auto

    named = settings.get("architectures")
    for name in named if isinstance(named, list) else ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if getattr(found, "config_class", None) is type(config):
            return found
    for task in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM"):
        known: Any = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING", {})
        if type(config) in known:
            return known[type(config)]
    return None
