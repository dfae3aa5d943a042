"""What is measured during a run, where it is written, and what a person sees of it."""
