"""Confidence of language models: self-consistency by meaning, calibration errors, and their intervals."""
