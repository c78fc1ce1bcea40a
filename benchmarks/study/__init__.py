"""The accuracy study: arms, runs, claims; benchmarks/accuracy.py is its command."""
