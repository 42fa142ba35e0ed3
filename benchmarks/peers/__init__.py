"""The parts of `benchmarks/peers.py`: the driver's, and one module per system, which runs in a
process and with a Python of its own."""
