"""Operator norms, margins, and the generalisation bounds that are computed from them."""
