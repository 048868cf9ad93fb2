"""Recall, split by where the fact is: needles among the sinks, in the window, and evicted; made offline from a seed."""
