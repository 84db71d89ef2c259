"""Values that travel between rooms and belong to none."""
