"""Every model that can be built small, under rules, against a reference that knows nothing of residrop.

`sources` says which models there are, `checks.examine` applies residrop to one and compares, `reference` is what it is
compared with. `benchmarks/sweep.py` runs all of them.
"""
