"""Runs and their files, in a folder or on S3."""
