"""Graphs on disk: our own files, those of other tools, and notes."""
