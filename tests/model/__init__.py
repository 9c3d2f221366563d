"""The run protocol as a model that is small enough to try every interleaving of it.

    python -m tests.model                 every scenario, then every break of it, as a table (--json)
    python -m tests.model linger          one scenario
    python -m tests.model no_cover        one break, with the shortest story that ends badly

A move is one transaction of the real code, one model call, one tool execution, one tick of a clock or one fault. `rules`
holds the transactions (each names the function it stands for), `moves` who may do what when, `proof` what must hold in
every state, `search` the breadth-first search and the question whether every state still leads to an end, `scenarios`
what is tried and how the protocol can be broken. What is not modelled stands in `scenarios` too.
"""
