"""Commands, run as ``python -m sonicmoe.cli.<name>``."""
