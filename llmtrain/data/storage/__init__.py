"""Data sets where they lie: shards, manifests, folders near and far, damage."""
