"""Watching over the ranks of a run, the same in every launcher: hangs, slow ranks, attempts, restarts."""
