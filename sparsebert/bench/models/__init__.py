"""BERT end to end: the same encoder with dense and packed weights, run as Python runs it, compiled or as a CUDA graph,
on padded and on unpadded rows. ``ladder.jobs`` is the work list, ``published.LINES`` what others have published.
"""
