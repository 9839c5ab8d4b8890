"""From a folder of images to batches: records, captions, buckets, cache; knows no model."""
