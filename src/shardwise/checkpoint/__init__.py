"""Checkpoints: ``format`` (shard_file, manifest, tree), ``save``, ``load`` by overlap, ``zero_to_fp32`` and ``export``.

docs/checkpoint-format.md specifies what is on disk.
"""
