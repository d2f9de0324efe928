"""Runs and artifacts, on a folder or on S3."""
