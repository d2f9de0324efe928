"""Fine-tuning of language models: losses that keep what a model knew, and what of it is tuned."""
