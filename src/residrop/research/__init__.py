"""Benchmarks, the ledger of results, the papers as data, and reports."""
