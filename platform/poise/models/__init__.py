"""Network architectures for images, and language models."""
