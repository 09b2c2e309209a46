"""Bytes -> rows -> training samples: `shards`, `images`, `annotations`, `write`, `augment`.

Nothing is imported here, so that a job that only reads annotations doesn't wait for torch.
"""
