"""Streams without a thread a reader: a small ASGI application around Django's.

    application = with_streams(get_asgi_application())

Django's own view lets a reader in, or tells it why not, and then hands it over (`app`). From there one `Broadcast` a process
serves all readers: it listens to one Redis subscription, reads the log of all runs that rang in one query a round (`log`), and
gives each event's bytes to all who follow it. `visitors` asks again who may still see what, `departure` hears that the process
is to end.
"""
