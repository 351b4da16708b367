"""The soak: runs broken in every way we know of, and what came of them. See `python -m tests.soak --help`."""
