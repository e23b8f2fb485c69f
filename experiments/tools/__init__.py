"""What needs no run of ours: merging checkpoint files, looking at the machine, handing runs to MLflow."""
