"""A package for each backend, of the shape that ``base`` describes, and ``choose``, which picks one for a call."""
