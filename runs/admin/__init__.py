"""Pages of Django's admin that show something of a run.

followed   lists and pages whose rows `runs.access` lets a user see
runs       runs: list, page, search
run_page   what a run's page shows below its fields
cancel     cancelling runs: confirmed, with a reason, into the log of the admin
parts      a message as a person reads it
threads    threads, which are edited here, and deleted by `Thread.delete`
messages   messages
calls      tool calls and their attempts
log        legs, steps, events, usage
agents     the definitions that were found in code: they have no rows
"""

from runs.admin import calls, log, messages, runs, threads

__all__ = ["calls", "log", "messages", "runs", "threads"]
