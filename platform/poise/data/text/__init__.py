"""Text data: records, formats, questions and batches of tokens."""
