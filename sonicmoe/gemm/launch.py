"""Where a framework's stream becomes the raw handle that a kernel launch takes."""


def raw_stream(stream) -> int | None:
    """The raw handle of what callers pass as ``stream_id``: a handle, a Stream object of either framework, or None.

    None and 0 mean the framework's current stream. An object without a handle is an error: taking its ``id`` for a
    stream has put kernels on the wrong queue before.
    """
    if stream is None:
        return None
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream or None
    base = getattr(stream, "stream_base", stream)
    for name in ("raw_stream", "cuda_stream"):
        handle = getattr(base, name, None)
        if isinstance(handle, int):
            return handle or None
    raise TypeError(f"stream_id: got {type(stream).__name__}, need an integer handle, a Stream object or None")
