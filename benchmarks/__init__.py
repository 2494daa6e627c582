"""Measurements against peers, in turn, in one run. Not tests: a number here depends on the machine."""
