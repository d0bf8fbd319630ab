"""Readers of training data and the augmentation that turns records into samples."""
