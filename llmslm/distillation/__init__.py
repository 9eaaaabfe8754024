"""What the small model learns from the LLM beside its states: the LLM's texts, and its distribution over tokens."""
