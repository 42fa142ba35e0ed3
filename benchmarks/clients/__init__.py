"""Programs that others wrote, as clients of the HTTP face; `benchmarks/clients.py` runs them."""
