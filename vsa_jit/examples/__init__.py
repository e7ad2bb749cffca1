"""Programs to run and to start from: ``python -m vsa_jit.examples.NAME``."""
