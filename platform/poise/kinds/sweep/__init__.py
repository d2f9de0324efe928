"""Kind sweep: one job varied over a space of values."""
