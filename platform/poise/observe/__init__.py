"""Metric names, Prometheus, progress and run events."""
