"""The records of benchmarks asked in several arms, and what came of it.

`sets.py` says which records are asked and how, `run.py` lets every arm read and answer them, `results.py` scores and
compares, `show.py` makes a page of it.
"""
