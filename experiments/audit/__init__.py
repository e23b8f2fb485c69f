"""What the networks of a run leak of the images that they were trained on."""
