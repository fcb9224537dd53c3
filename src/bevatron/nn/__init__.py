"""The decoder and its parts, written for reading.

Shape legend, used in every file of this room:
B batch, T time, h hidden_size, H query heads, G KV groups (KV heads), q query heads per group,
D head_dim, R rotated dimensions of a head, f intermediate_size, V vocabulary.
Under tensor parallelism H, G, f and V are this rank's share, and T between the sublayers is this
rank's share of the sequence if sequence parallelism is on; see `nn/rank_communication.py`.
"""
