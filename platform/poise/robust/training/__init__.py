"""Training of robust models around the objective: weight averages, weight perturbation, and monitors."""
