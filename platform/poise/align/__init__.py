"""Preferences, games between answers, and self-play towards their equilibria."""
