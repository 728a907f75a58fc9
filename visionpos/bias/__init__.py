"""Encodings that add a number to each attention logit, one per file."""
