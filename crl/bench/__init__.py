"""Side-by-side benchmarks, each runnable alone."""
