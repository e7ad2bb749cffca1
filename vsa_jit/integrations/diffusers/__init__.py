"""Video Sparse Attention in diffusers' video transformers, from one line."""

from vsa_jit.integrations.diffusers.checkpoint import load_fastwan
from vsa_jit.integrations.diffusers.enable import disable_vsa, enable_vsa
from vsa_jit.integrations.diffusers.record import Recording, record

__all__ = ["Recording", "disable_vsa", "enable_vsa", "load_fastwan", "record"]
