"""The demo: an agent, a tool that leaves a trace, a model server that speaks from a script, and who kills workers.

agents.py         the agent `tester` and its tool
models.py         the ledger: one row a call that was really done
model_server.py   OpenAI's streaming protocol, from scripts.py
supervisor.py     the processes: started, killed on purpose, replaced
standby.py        a worker that waits to take the place of a dead one
sabotage.py       who is killed, and when
verdict.py        every claim of the demo, checked against the database
view.py           the live view of it all
"""
