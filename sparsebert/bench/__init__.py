"""Measuring: a timing core, the record of where numbers were taken, and the benchmarks built on both.

Nothing is imported here: ``sparsebert.bench.timing`` and ``sparsebert.bench.environment`` need torch only, while the
benchmarks beside them may load a model.
"""
