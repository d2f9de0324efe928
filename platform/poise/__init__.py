"""Poise: distributed training of robust, calibrated and fairly aligned models."""

__version__ = "0.1.0"
