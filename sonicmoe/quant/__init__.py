"""FP8: formats, quantizers, and the payloads that dispatchers hand over."""
