"""Grids of runs: the file that lays them out, and the bench that runs them."""
