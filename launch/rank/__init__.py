"""The life of one rank: who it is, where it meets the others, its work, its log and its end."""
