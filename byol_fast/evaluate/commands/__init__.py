"""The tasks of `python -m byol_fast.evaluate`, a module each."""
