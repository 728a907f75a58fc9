"""Encodings that mix neighbouring tokens, one per file."""
