"""One module for each backend, named after it, and ``choose``, which picks one for a call."""
