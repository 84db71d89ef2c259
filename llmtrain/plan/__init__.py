"""Arithmetic about runs that need not exist: memory, and layouts in words. No torch."""
