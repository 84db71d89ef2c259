"""Adapters in PEFT's form: which modules they belong to, their files, both ways."""
