"""The parts of benchmarks/moe.py. Only `worker` and `reference` need torch; they run in the providers' processes."""
