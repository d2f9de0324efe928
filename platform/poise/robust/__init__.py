"""Robustness under attack: threats, attacks, objectives of adversarial training, and evaluation."""
