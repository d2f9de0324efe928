"""Kind bounds.report: generalisation bounds of trained networks."""
