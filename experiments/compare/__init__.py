"""Runs held against each other: stages over seeds, paired differences with their tests, ranks of methods."""
