"""Synthetic conversations: plan, generate through any Backend, verify, and hand on as chat samples."""
