"""Encodings that rotate queries and keys, one per file."""
