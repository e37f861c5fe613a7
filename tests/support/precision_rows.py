"""What precision is measured on, whatever runs it."""

# (N, K, E, I) of the table that users of this layer publish; its H is that of the reference shape.
ROWS = (
    (128, 4, 4, 384),
    (128, 8, 8, 384),
    (512, 4, 8, 1536),
    (512, 8, 8, 1536),
    (1024, 8, 8, 1536),
    (256, 8, 32, 1536),
)
FULL_HIDDEN = 3072
HEAVY_CHANNEL, HEAVY_FACTOR = 37, 100.0
