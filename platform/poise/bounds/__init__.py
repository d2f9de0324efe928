"""Operator norms, margins and the generalisation bounds that are made of them."""
