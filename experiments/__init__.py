"""The command line and everything around a run: launching, grids, tables, pictures, reports."""
