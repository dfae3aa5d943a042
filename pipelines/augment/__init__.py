"""Photometry on the device: from uint8 crops and a colour table to normalised views.

`reference` is plain torch: the meaning of the method, the oracle of every faster path, and what
runs on a CPU.
"""
