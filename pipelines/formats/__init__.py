"""What the bytes of image formats hold, read before any decoder sees them."""
