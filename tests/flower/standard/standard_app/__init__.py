"""An app of the form that Flower's PyTorch quickstart has: its records, their names, batches that are dicts, FedAvg."""
