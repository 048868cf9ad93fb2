"""Streaming perplexity: how well each arm predicts a text of any length, and what it holds of it meanwhile.

`documents` says what is read, and `ngrams` which tokens repeat something rare. `reading` reads one document in one arm.
`averages` puts it all together, `cache_sizes` counts bytes, `curves` and `gap` draw it.
"""
