"""`fbgemm_fp8`: e4m3 codes with a scale per row.

Source: FbgemmFp8Config and FbgemmFp8Linear of transformers.
"""

from __future__ import annotations

from .form import ROW, Form, Scheme, listed
from .settings import WIDE, Keys, Settings

KEYS = Keys(
    used=frozenset({"quant_method", "modules_to_not_convert"}),
    irrelevant={"activation_scale_ub": WIDE, "kv_cache_scheme": WIDE},
)


def read_fbgemm(settings: Settings) -> Scheme:
    """Return the scheme of quant_method fbgemm_fp8."""
    settings.check(KEYS)
    form = Form((ROW,), settings.place)
    excluded = settings.patterns("modules_to_not_convert", listed)
    return Scheme("fbgemm_fp8", settings.place, default=form, excluded=excluded)
