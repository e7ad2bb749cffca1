"""What a process remembers of the cache of compiled kernels."""

from vsa_jit.jit.cache import location, lookup


def forget() -> None:
    """Makes this process look for its cache again, and warn again."""
    for remembered in (location._open_cache, location.warn_not_persistent, lookup._warn_bad):
        remembered.cache_clear()
    location._private_caches.clear()
