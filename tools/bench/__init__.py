"""Measurements of single rooms, one module each."""
