"""What a learned representation is worth: kNN and linear accuracy of frozen features."""
