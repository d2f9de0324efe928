"""Code that several kinds share: opening, measuring and exporting models."""
