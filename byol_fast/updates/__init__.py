"""The implementations of LARS and the moving average that `optim` chooses from."""
