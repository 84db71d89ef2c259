"""Starting a run somewhere: one rank's set-up, and the launchers that start ranks."""
