"""Where tokens go: the metadata that every kernel of a layer reads, and the combine that brings slots back."""
