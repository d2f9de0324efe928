"""Robustness under attack: threats, attacks, objectives and honest evaluation."""
