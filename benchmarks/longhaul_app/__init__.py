"""The agents that the benchmarks run."""
