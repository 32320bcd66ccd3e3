"""Step: measure everything that decides which model, precision and runtime to use, in one run.

    suite ──► contestants ──► rounds of processes ──► answers ──► document ──► pick

`run.bench` is the order of things. `suite` says what is asked for and `contestants` who takes part;
`process` holds each in a process of its own, in which `worker` lets `station` measure it; `rounds`
lets them take turns, `accuracy` lets them answer labelled images, `peaks` is the roof they are
held against; `rows` and `document` write it all down and `pick` draws the conclusion. `compare`
holds two documents against each other. `interleaved` measures callables in this very process, for
`cnnedge export`.

Nothing is imported here: a measuring process begins with this file, and what it imports before the
runtime would count as the runtime's cold start.
"""
