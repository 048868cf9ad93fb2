"""Recall, split by where the fact is: needles among the sinks, in the window, and evicted.

`tasks.py` says what is hidden and asked, `text.py` and `items.py` make tokens of it, `run.py` lets every arm read and
answer, `results.py` counts, `plot.py` draws. All of it is made from a seed, offline.
"""
