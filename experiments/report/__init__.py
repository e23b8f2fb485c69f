"""Runs shown: tables of the terminal, pictures, and the page ``report.html``."""
