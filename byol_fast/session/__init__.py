"""One session of a run: its data and folder, checkpoints, signals, failing ranks, and its end."""
