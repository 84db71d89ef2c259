"""Ranks as actors of Ray, and runs as its jobs. The only room, besides data pipelines, that knows Ray."""
