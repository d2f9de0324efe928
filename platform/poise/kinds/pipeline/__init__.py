"""Kind pipeline: jobs in order, each of which can read the results of earlier ones."""
