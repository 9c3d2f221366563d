"""Two plain DRF views, the yardstick of `benchmarks.http`: they check a key, and insert a row or read one."""
