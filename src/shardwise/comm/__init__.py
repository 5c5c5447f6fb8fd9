"""How tensors travel between ranks: one small interface, several transports behind it.

``single``  one rank: nothing travels.
``native``  the backend's own all-gather and reduce-scatter (NCCL; gloo for tests).
``ordered``  gloo by point-to-point messages; sums in rank order.
``shared_memory``  ranks on one host: each reads the others' memory; sums in rank order.
"""
