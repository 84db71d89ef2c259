"""Texts with labels, from files of records to shards that a head for labels is trained on."""
