"""A client of a Longhaul server, which misses nothing of a stream."""
