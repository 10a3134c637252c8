"""kvwal against its peers, as called from Python.

plan      what is measured, and what kvwal must reach
run       the parent: one fresh process for each measurement, peers in turn, rounds repeated
against   older commits as peers, each in a virtual environment of its own
child     the process of one measurement
tasks/    what a child does: the measuring loops
peers/    one adapter for each peer, tuned as its own documentation advises
data      keys, values and the distributions they are drawn from
results   medians, spreads, ratios and verdicts; `results.json`
show      the terminal table
pictures  the SVG pictures
report    `docs/benchmarks.md`

feeds, past   the feed and past moments, beside peers of their own; their parts are in feed/ and history/
parts         how these are run and shown
memory        what the system says of a process

python -m bench                run everything (hours rather than minutes)
python -m bench --quick        a few minutes, to see whether a change made something slower
python -m bench --against REV  with an older commit as one more peer
python -m bench report         bring docs/benchmarks.md and its pictures up to date
python -m bench.feeds          the feed of changes; python -m bench.past: past moments
python -m bench.recorders      event sourcing, beside the SQLite module of the library
python -m pytest bench/micro   micro-benchmarks of the hot paths, under a minute
"""
