"""Measurements of speed, memory and tracing, each by itself. What an experiment claims is a study or a grid."""
