"""The backend runs every call on every device."""

from __future__ import annotations

from vsa_jit.backends.base import OPERATORS, BackendSpec

SPEC = BackendSpec(
    name="torch",
    is_native_on=lambda device: True,
    why_not_on=lambda device: None,
    why_not=lambda problem, dtype, tensors: None,
    engine_of=lambda problem, device, dtype: None,
    runners=dict.fromkeys(OPERATORS, "torch"),
)
