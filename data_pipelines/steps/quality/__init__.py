"""Rules that tell text that people wrote for people from the rest."""
