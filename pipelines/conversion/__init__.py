"""Images of any store into one `.beton` file; the command is `pipelines.convert`."""
