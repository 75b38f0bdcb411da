"""llmmw beside its peers: the same rows for each, every peer in an environment and a process of its own.

`python -m peers --help` (with `PYTHONPATH=benchmarks`) or `make bench-peers`. `protocol.py` is what an adapter is,
`worker.py` the process it runs in, `rows.py` what is measured, `report.py` the table, the chart and the verdict.
"""
