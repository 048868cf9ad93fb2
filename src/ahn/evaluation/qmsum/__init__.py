"""QMSum: questions about meetings, split by whether the turns that answer them are still in the window.

`meetings.py` reads the files, `run.py` lets every arm read a meeting once and scores the gold answer of each question
on a copy of what it then knows, `results.py` counts, `show.py` makes a page of it. Source: arXiv 2104.05938.
"""
