"""Fine-tuning of language models: losses that preserve diversity, and the choice of tuned parameters."""
