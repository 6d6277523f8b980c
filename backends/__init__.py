"""Run a plan: the torch executor, its launcher and its microbenchmarks."""
