"""Streaming perplexity: how well each arm predicts a text of any length, and what it holds of it meanwhile.

`documents` says what is read, `ngrams` which tokens repeat something rare, `measure` reads one document in one arm,
`results` puts it all together, `plot` draws it.
"""
