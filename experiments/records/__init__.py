"""What runs have left: run folders read, one tidy table of a folder of them, the keys by which they differ."""
