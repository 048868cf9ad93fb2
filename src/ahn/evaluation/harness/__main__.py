"""The command line of lm-evaluation-harness, which knows the model class `ahn` here."""

from lm_eval.__main__ import cli_evaluate

cli_evaluate()
