"""Detection and segmentation: the pretrained network is fine-tuned under a head for dense tasks."""
