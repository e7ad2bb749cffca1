"""What fastvideo-kernel has and this distribution has not."""


def absent(name: str) -> ImportError:
    """The error for a name; FastVideo expects ImportError, and of an AttributeError ``from`` drops the message."""
    return ImportError(
        f"{name}: expected the package fastvideo-kernel, got vsa-jit-fastvideo-kernel, which has "
        "Video Sparse Attention alone"
    )
