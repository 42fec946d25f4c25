"""The dLLM families, one file each: what their checkpoints are called, and what makes them this family."""
