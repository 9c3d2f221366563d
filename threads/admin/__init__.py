"""Pages of Django's admin: what all of Longhaul's share, and API keys.

listing   lists whose cost does not grow with their table
marks     how times, JSON and links are written
keys      API keys

Pages that show something of a run stand in `runs.admin`, workers in `tools.admin`.
"""

from threads.admin import keys

__all__ = ["keys"]
