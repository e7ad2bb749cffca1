"""The benchmark: sweeps cases, checks each one's outputs, then measures it beside dense attention."""
