"""Runs on this machine: Ray and Flower's simulation runtime, and local training done once for several runs."""
