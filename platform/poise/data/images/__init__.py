"""Image data sets: readers, splits, augmentation and batches."""
