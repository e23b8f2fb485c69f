"""Measurements that stand on their own: each answers one question and says what it expects."""
