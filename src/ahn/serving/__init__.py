"""A server whose sessions never grow: an engine that decodes all of them together, and OpenAI's protocol over it."""
