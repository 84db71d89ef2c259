"""Before a run takes any device: storage, vocabulary, what a resume allows. No torch."""
