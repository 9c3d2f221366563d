"""The HTTP API: everything of it stands here, for every resource shows something of a run.

`view` is the one gate: each method of each view is an `operation` that says what it takes, what it answers, and whom it lets in.
"""
