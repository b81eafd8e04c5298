"""Measuring planc's kinds of ops on a GPU with torch, and fitting constants to what was measured (docs/gpu.md)."""
