"""What we claim, measured beside what a user would pick instead. `python -m benchmarks`; README.md says how."""
