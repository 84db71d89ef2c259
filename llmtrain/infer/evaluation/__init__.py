"""Trained models measured on tasks."""
