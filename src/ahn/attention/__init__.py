"""One forward call: which tokens a query may read, and how sinks, window, anchors and memory are read."""
