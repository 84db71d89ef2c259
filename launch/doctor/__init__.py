"""What this machine and this installation can do, looked at and tried out, and what would mend the rest."""
