"""The benchmarks as commands."""
